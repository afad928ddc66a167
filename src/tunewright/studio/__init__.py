"""The studio: review, blind comparison, reports and jobs of a project in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewright.studio.app import Studio

__all__ = ["Studio"]


def __getattr__(name: str) -> Any:
    if name != "Studio":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on use: the command line reads the project's stages without the server, which takes two seconds more.
    from tunewright.studio.app import Studio

    return Studio
