"""The access log under any sequence of writes, edits and openings, against a dictionary of what each file should be."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from making.evidence import make_evidence, make_items, make_opening
from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.files import EVIDENCE_FILE, ITEMS_FILE
from tunewright.evidence.logged_access import LoggedAccess

EVIDENCE = make_evidence(make_items())
TEXT = st.sampled_from(["one\n", "two\n", "{}", ""])
NUMBER = st.integers(1, 3)
INDEX = st.integers(0, 63)


class AccessLogMachine(RuleBasedStateMachine):
    """Each step opens the log again, as each command does."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="log-")) / "evaluations"
        self.bound: dict[Path, bytes] = {}
        """Each file's content as its newest line has it."""
        self.edited: set[Path] = set()
        self.opened: list[str] = []
        self.log = b""

    def _files(self) -> list[Path]:
        return sorted(file for file in self.bound if file.exists())

    @rule(number=NUMBER)
    def open(self, number: int) -> None:
        kept = set(LoggedAccess.model_fields) - {"schema_version", "number", "time", "previous", "digest"}
        opening = make_opening(number)
        facts = {name: getattr(opening, name) for name in kept}
        made = AccessLog(self.folder).open(**facts)
        if opening.evaluation not in self.opened:
            self.opened.append(opening.evaluation)
        again = AccessLog(self.folder)
        assert made in again.openings
        assert [line.evaluation for line in again.openings] == self.opened

    @rule(number=NUMBER, text=TEXT)
    def write(self, number: int, text: str) -> None:
        file = self.folder / f"advice-{number}.json"
        AccessLog(self.folder).write(file, text)
        self.bound[file] = text.encode()
        self.edited.discard(file)

    @rule(number=NUMBER, text=TEXT)
    def add(self, number: int, text: str) -> None:
        folder = self.folder / f"evaluation-{number}"
        there = (folder / EVIDENCE_FILE).exists()
        files = {ITEMS_FILE: text, EVIDENCE_FILE: EVIDENCE.model_dump_json()}
        AccessLog(self.folder).add(folder, files)
        if not there:
            self.bound |= {folder / name: text.encode() for name, text in files.items()}
            self.edited -= {folder / name for name in files}

    @rule(number=NUMBER, text=TEXT)
    def amend(self, number: int, text: str) -> None:
        folder = self.folder / f"evaluation-{number}"
        if not (folder / EVIDENCE_FILE).exists():
            return
        faulty = any(file.parent == folder for file in self.edited)
        try:
            AccessLog(self.folder).amend(folder, {"judge.jsonl": text})
        except UserError:
            assert faulty
            return
        assert not faulty
        for name in ("judge.jsonl", EVIDENCE_FILE):
            self.bound[folder / name] = (folder / name).read_bytes()
        assert self.bound[folder / "judge.jsonl"] == text.encode()

    @precondition(lambda self: self._files())
    @rule(index=INDEX)
    def edit(self, index: int) -> None:
        file = self._files()[index % len(self._files())]
        file.write_bytes(self.bound[file] + b" ")
        self.edited.add(file)

    @precondition(lambda self: self.edited)
    @rule(index=INDEX)
    def restore(self, index: int) -> None:
        file = sorted(self.edited)[index % len(self.edited)]
        file.write_bytes(self.bound[file])
        self.edited.remove(file)

    @precondition(lambda self: self.folder.exists())
    @rule(number=NUMBER)
    def remove(self, number: int) -> None:
        folder = self.folder / f"evaluation-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        self.edited = {file for file in self.edited if file.parent != folder}
        self.bound = {file: content for file, content in self.bound.items() if file.parent != folder}

    @precondition(lambda self: self.log)
    @rule(index=st.integers(0, 10_000), byte=st.integers(1, 255))
    def damage_the_log(self, index: int, byte: int) -> None:
        path = self.folder / "access_log.jsonl"
        whole = path.read_bytes()
        at = index % (len(whole) - 1)  # the last byte ends the last line
        path.write_bytes(whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :])
        with pytest.raises(UserError):
            AccessLog(self.folder)
        path.write_bytes(whole)

    @invariant()
    def files_are_as_bound(self) -> None:
        if not hasattr(self, "folder") or not self.folder.exists():
            return
        log = AccessLog(self.folder)
        for file in self._files():
            if file in self.edited:
                with pytest.raises(UserError, match="was changed after it was written"):
                    log.require(file)
            else:
                log.require(file)
                assert file.read_bytes() == self.bound[file]
        assert not list(self.folder.rglob("*.staged*"))
        text = log.path.read_bytes() if log.path.exists() else b""
        assert text.startswith(self.log)  # lines are only added
        self.log = text

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder.parent, ignore_errors=True)


TestAccessLog = AccessLogMachine.TestCase
TestAccessLog.settings = settings(examples(40, quick=5), stateful_step_count=25)
