"""What many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import build_base


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and the ChatML template."""
    return build_base(tmp_path_factory.mktemp("bases") / "tiny-llama")
