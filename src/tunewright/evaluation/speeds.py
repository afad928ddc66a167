"""Times of earlier answers and suites on this machine, from which the time of later ones is estimated."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewright.core.io import digest, write_json
from tunewright.evaluation.time_limit import Work

_SUITE = "suite: "


class Speeds:
    """The newest times of a project with one base, engine and device on this machine, in the working folder."""

    def __init__(self, work: Path, decides: Mapping[str, Any]) -> None:
        self._file = work / "speeds.json"
        self._key = digest({**decides, "machine": platform.node()})[:16]

    def add_answers(self, arm: str, answers: int, seconds: float, loading: bool) -> None:
        """Keep the time of an arm's answers; ``loading`` says that it contains the time of loading the model."""
        known = self._known().get(arm)
        if known is None or not loading:
            self._keep(arm, answers, seconds)

    def add_suite(self, name: str, seconds: float) -> None:
        """Keep the time of a suite."""
        known = self._known().get(f"{_SUITE}{name}")
        # A resumed suite takes less time than the next adapter's, but that one finds the base's results: half of all.
        self._keep(f"{_SUITE}{name}", 1, seconds if known is None else max(seconds, known[1] / 2))

    def of_answers(self, works: Sequence[Work]) -> float | None:
        """Return the seconds of these answers: an unknown arm's are the mean of the known arms; None if none is."""
        known = {name: value for name, value in self._known().items() if not name.startswith(_SUITE)}
        if not any(work.answers for work in works):
            return 0.0
        if not known:
            return None
        mean = sum(seconds for _, seconds in known.values()) / sum(answers for answers, _ in known.values())
        each = {name: seconds / answers for name, (answers, seconds) in known.items()}
        return sum(work.answers * each.get(work.arm, mean) for work in works)

    def of_suite(self, name: str) -> float | None:
        """Return the seconds of a suite; None if it was not measured here."""
        found = self._known().get(f"{_SUITE}{name}")
        return None if found is None else found[1]

    def _known(self) -> dict[str, tuple[int, float]]:
        """Return the number of answers, or 1 for a suite, with its seconds, by name."""
        return {name: (count, seconds) for name, (count, seconds) in self._read().get(self._key, {}).items()}

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        return found

    def _keep(self, name: str, count: int, seconds: float) -> None:
        known = self._read()
        known.setdefault(self._key, {})[name] = [count, round(seconds, 3)]
        write_json(self._file, known)
