"""A server's effect on its own process."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import tunewright
from command_line import tiny_project
from tunewright.serving.options import ServeOptions


@pytest.mark.slow
def test_garbage_collection_skips_loaded_objects_while_serving(small_base: Path, tmp_path: Path) -> None:
    service = tunewright.open(tiny_project(tmp_path / "project", small_base)).serve(options=ServeOptions(port=0))
    gc.unfreeze()  # what tests/conftest.py exempts
    loaded = len(gc.get_objects())
    with service.running():
        assert len(gc.get_objects()) < loaded / 10
    assert len(gc.get_objects()) > loaded / 2
    assert gc.get_freeze_count() == 0
