"""The corpus of hostile adapters, and the decorator that adds a builder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Build = Callable[[Path], Path]
"""Writes a hostile adapter below a folder, and returns the path to import."""

CORPUS: dict[str, tuple[Build, str]] = {}
"""By name: who builds it, and words of the reason (a regular expression)."""

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def hostile(words: str) -> Callable[[Build], Build]:
    """Add a builder to the corpus."""

    def add(build: Build) -> Build:
        CORPUS[build.__name__] = (build, words)
        return build

    return add


class Payload:
    """A pickle that would write a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/tunewright-was-here",))
