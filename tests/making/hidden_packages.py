"""An environment for processes in which some installed packages cannot be imported."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
_HIDE = """
import sys
HIDDEN = {modules!r}
class Hide:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.split('.')[0] in HIDDEN else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""


def without(modules: Collection[str], folder: Path) -> dict[str, str]:
    """Return the environment of processes that find none of these top-level modules; ``folder`` is new or empty."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HIDE.format(modules=sorted(modules)), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT / "tests")])}
