"""A judge's preferences, whichever judge it was: what people are compared with, and helped by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class JudgePreferences:
    """A judge's name, and pair key to 1 (the treatment is better), -1 (the control is) or 0.

    Items that the judge could not score are not in it.
    """

    name: str
    preferences: Mapping[str, int]
