"""The dataset store under any sequence of commands, against a dictionary of rows for each version."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from making.property_examples import examples
from tunewright.config.project import OpenFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.remove import remove
from tunewright.data.verify import verify
from tunewright.data.versions import checkout, list_versions, load_version

pytestmark = pytest.mark.slow  # each step writes and reads a version, which takes a fifth of a second

PAIRS = unlike_pairs(40, seed=7)
OUTPUT = dict(PAIRS)
SOME = st.lists(st.sampled_from(range(40)), min_size=1, max_size=6, unique=True)
Rows = dict[str, tuple[str, str]]
"""Input to output and split."""


class DatasetMachine(RuleBasedStateMachine):
    """Rows are unlike each other, so each is a cluster of its own and none is a duplicate."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dataset-"))
        self.project = new_project(self.folder / "p")
        self.splits: dict[str, str] = {}
        """The split that each input was given first."""
        self.versions: dict[str, Rows] = {}
        self.removed: set[tuple[str, str]] = set()
        self.superseded: set[tuple[str, str]] = set()
        self._add(list(range(24)))

    def _rows(self, digest: str | None = None) -> Rows:
        version = load_version(self.project.dataset, digest)
        return {m.example.input_text: (m.example.output, m.split) for m in version.members}

    def _saved(self) -> None:
        """Remember the version that is now current."""
        digest = load_version(self.project.dataset).digest
        rows = self._rows()
        assert self.versions.setdefault(digest, rows) == rows
        for text, (_, split) in rows.items():
            assert self.splits.setdefault(text, split) == split, "a row has changed its split"

    def _add(
        self, numbers: list[int], output: str | None = None, *, replace: bool = False, restore: bool = False
    ) -> None:
        before = self._rows() if self.versions else {}
        pairs = [(PAIRS[n][0], output or PAIRS[n][1]) for n in numbers]
        # A conflict, or an answer that is there in another version, is refused or ignored as a whole file.
        result = add(
            self.project,
            [write_jsonl(self.folder / "new.jsonl", pairs)],
            Listener(),
            AddOptions(replace=replace, restore=restore),
        )
        after = self._rows()
        for text, wanted in pairs:
            out = self.removed if replace else self.removed | self.superseded
            withheld = not restore and (text, wanted) in out
            if withheld:
                assert after.get(text) == before.get(text)
            else:
                assert after[text][0] == wanted
                if text in before and before[text][0] != wanted:
                    self.superseded.add((text, before[text][0]))
                self.removed.discard((text, wanted))
                self.superseded.discard((text, wanted))
        assert {text: row for text, row in after.items() if text not in dict(pairs)} == {
            text: row for text, row in before.items() if text not in dict(pairs)
        }
        assert result.version.digest == load_version(self.project.dataset).digest
        assert (after == before) == (not result.created)
        self._saved()

    @rule(numbers=SOME)
    def add_known_or_new(self, numbers: list[int]) -> None:
        rows = self._rows()
        known = [n for n in numbers if rows.get(PAIRS[n][0], PAIRS[n][1:])[0] == PAIRS[n][1]]
        if known:
            self._add(known)

    @rule(numbers=SOME, output=st.sampled_from(["other", "third"]))
    def replace(self, numbers: list[int], output: str) -> None:
        self._add(numbers, output, replace=True)

    @rule(numbers=SOME)
    def restore(self, numbers: list[int]) -> None:
        self._add(numbers, replace=True, restore=True)

    @rule(number=st.sampled_from(range(40)))
    def conflict_changes_nothing(self, number: int) -> None:
        text = PAIRS[number][0]
        before = self._rows()
        if text not in before or (text, "conflict") in self.removed | self.superseded:
            return
        with pytest.raises(UserError):
            add(self.project, [write_jsonl(self.folder / "new.jsonl", [(text, "conflict")])], Listener())
        assert self._rows() == before

    @rule(numbers=SOME)
    def remove(self, numbers: list[int]) -> None:
        before = self._rows()
        keys = {m.example.input_text: m.key for m in load_version(self.project.dataset).members}
        going = [PAIRS[n][0] for n in numbers if PAIRS[n][0] in keys]
        file = self.folder / "keys.txt"
        file.write_text("".join(f"{keys[text]}\n" for text in going))
        try:
            remove(OpenFolder(self.project, Listener()), RemoveOptions(because="a reason", keys=file))
        except UserError:
            assert self._rows() == before
            return
        assert self._rows() == {text: row for text, row in before.items() if text not in going}
        for text in going:
            del self.splits[text]  # a row with its input and another answer would be a new one
        self.removed |= {(text, before[text][0]) for text in going}
        self._saved()

    @precondition(lambda self: len(self.versions) > 1)
    @rule(index=st.integers(0, 63))
    def read_an_earlier_version(self, index: int) -> None:
        digest = sorted(self.versions)[index % len(self.versions)]
        current = load_version(self.project.dataset).digest
        checkout(self.project.dataset, digest[:16])
        assert load_version(self.project.dataset).digest == digest
        checkout(self.project.dataset, current)

    @invariant()
    def versions_are_as_saved(self) -> None:
        if not hasattr(self, "project"):
            return
        assert {manifest.digest for manifest in list_versions(self.project.dataset)} == set(self.versions)
        assert self._rows() in self.versions.values()

    def teardown(self) -> None:
        """Every version still has its rows, and every file agrees with its digest."""
        if not hasattr(self, "project"):
            return
        for digest, rows in self.versions.items():
            assert self._rows(digest) == rows
        assert not verify(OpenFolder(self.project, Listener())).damage
        shutil.rmtree(self.folder)


TestDataset = DatasetMachine.TestCase
TestDataset.settings = settings(examples(20, quick=2), stateful_step_count=8)
