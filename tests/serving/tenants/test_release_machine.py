"""Releases of several aliases in one state, closed and opened in between, against a list and a stack for each alias."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from states import DIGESTS, SHIP

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.gate.results import IsolationTest
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Candidate, Grounds, Release

ALIASES = st.sampled_from(["courts", "forms"])
NAMES = st.sampled_from("abc")
# Mostly what is allowed, so that histories become long.
TESTED = st.sampled_from([None, None, None, {"a", "b", "c"}, {"a", "b"}, {"c"}])
NUMBERS = st.sampled_from([None, None, None, None, 0, 1, 2, 3, 5, 8])


@dataclass(frozen=True)
class Line:
    """One release."""

    name: str
    candidate: str | None = None
    undeployed: bool = False


@dataclass
class Alias:
    """All releases, and the earlier adapters with the release in which each began."""

    lines: list[Line] = field(default_factory=list)
    before: list[tuple[str, int]] = field(default_factory=list)
    began: int = 0

    @property
    def now(self) -> Line | None:
        return self.lines[-1] if self.lines else None

    @property
    def live(self) -> set[str]:
        """The adapters that answer."""
        if self.now is None or self.now.undeployed:
            return set()
        return {self.now.name, *([self.now.candidate] if self.now.candidate else [])}

    def add(self, line: Line, restores: int | None = None) -> None:
        now = self.now
        self.lines.append(line)
        if now is None:
            self.began = 1
        elif now.name != line.name:
            if self.before and restores == self.before[-1][1]:
                _, self.began = self.before.pop()
            else:
                self.before.append((now.name, self.began))
                self.began = len(self.lines)

    def rollback_target(self, number: int | None) -> int | None:
        """The release that a rollback restores, or None if there is none."""
        now = self.now
        if now is None:
            return None
        ends = now.candidate is not None or now.undeployed
        if number is not None:
            if not 1 <= number <= len(self.lines):
                return None
            back = self.lines[number - 1]
            return None if back.undeployed or (back.name == now.name and not ends) else number
        if ends:
            plain = [n for n, line in enumerate(self.lines, 1) if line.candidate is None and not line.undeployed]
            return plain[-1]
        return self.before[-1][1] if self.before else None


def _tested(*names: str) -> Grounds:
    test = IsolationTest(
        "isolated", "s" * 64, "peft", "cpu", "b" * 64, tuple(DIGESTS[n] for n in names), {}, 0.1, (), (), (), "t", 1.0
    )
    return Grounds("ship", "0123456789ab", isolation=test)


class ReleaseMachine(RuleBasedStateMachine):
    """Any commands on two aliases; the ones that the model refuses must be refused, and change nothing."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="releases-"))
        self.state = State(f"sqlite:///{self.folder}/state.sqlite", "ann")
        self.model = {"courts": Alias(), "forms": Alias()}

    def _do(self, allowed: bool, command: object, alias: str, line: Line | None, restores: int | None = None) -> None:
        try:
            made = command()  # type: ignore[operator]
        except UserError as error:
            assert not allowed, error
            return
        assert allowed
        assert line is not None
        self.model[alias].add(line, restores)
        assert made.number == len(self.model[alias].lines)
        assert made.restores == restores

    def _covered(self, alias: str, tested: set[str], *names: str) -> bool:
        others = {name for other, model in self.model.items() if other != alias for name in model.live}
        return {*names, *others} <= tested

    @rule(alias=ALIASES, name=NAMES, tested=TESTED)
    def deploy(self, alias: str, name: str, tested: set[str] | None) -> None:
        now = self.model[alias].now
        allowed = now != Line(name) and (tested is None or self._covered(alias, tested, name))
        grounds = SHIP if tested is None else _tested(*sorted(tested))
        self._do(allowed, lambda: self.state.releases.deploy(alias, name, DIGESTS[name], grounds), alias, Line(name))

    @rule(alias=ALIASES, name=NAMES, share=st.sampled_from([0.1, None, 1.5]), tested=TESTED)
    def start_candidate(self, alias: str, name: str, share: float | None, tested: set[str] | None) -> None:
        now = self.model[alias].now
        candidate = Candidate(name, DIGESTS[name], share)
        # A candidate on trial may be tried again with another share.
        live = self.state.releases.live().get(alias)
        same = live is not None and live.candidate == candidate
        allowed = share != 1.5 and now is not None and not now.undeployed and now.name != name and not same
        if allowed and now is not None and tested is not None:
            allowed = self._covered(alias, tested, now.name, name)
        grounds = SHIP if tested is None else _tested(*sorted(tested))
        line = None if now is None else Line(now.name, name)
        self._do(allowed, lambda: self.state.releases.start_candidate(alias, candidate, grounds), alias, line)

    @rule(alias=ALIASES)
    def promote(self, alias: str) -> None:
        now = self.model[alias].now
        chosen = None if now is None else now.candidate
        line = None if chosen is None else Line(chosen)
        self._do(chosen is not None, lambda: self.state.releases.promote(alias, SHIP), alias, line)

    @rule(alias=ALIASES, number=NUMBERS)
    def rollback(self, alias: str, number: int | None) -> None:
        model = self.model[alias]
        target = model.rollback_target(number)
        line = None if target is None else Line(model.lines[target - 1].name)
        self._do(target is not None, lambda: self.state.releases.rollback(alias, number), alias, line, target)

    @rule(alias=ALIASES)
    def undeploy(self, alias: str) -> None:
        now = self.model[alias].now
        allowed = now is not None and not now.undeployed
        line = None if now is None else Line(now.name, undeployed=True)
        self._do(allowed, lambda: self.state.releases.undeploy(alias), alias, line)

    @rule()
    def open_again(self) -> None:
        self.state.close()
        self.state = State(f"sqlite:///{self.folder}/state.sqlite", "bob")

    @invariant()
    def histories_agree(self) -> None:
        if not hasattr(self, "state"):
            return
        live = self.state.releases.live()
        for alias, model in self.model.items():
            now = live.get(alias)
            assert (_line(now) if now else None) == (model.now if model.live else None)
            if model.lines:
                assert [_line(release) for release in self.state.releases.history(alias)] == model.lines

    def teardown(self) -> None:
        """The audit log agrees with the releases."""
        if hasattr(self, "state"):
            assert self.state.verify().faults == ()
            self.state.close()
            shutil.rmtree(self.folder)


def _line(release: Release) -> Line:
    candidate = None if release.candidate is None else release.candidate.adapter
    return Line(release.adapter, candidate, release.undeployed)


TestReleases = ReleaseMachine.TestCase
TestReleases.settings = settings(examples(40, quick=5), stateful_step_count=25)
