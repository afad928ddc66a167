"""The verbs on releases: ``tunewright deploy``, ``promote``, ``rollback``, ``releases``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunewright.adapters.fit import require_fit, trained_quantize
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.servable import require_batchable
from tunewright.adapters.standing import require_sound
from tunewright.errors import UserError
from tunewright.evaluation.evidence import evidence_on
from tunewright.evaluation.verdict import Verdict, verdict
from tunewright.road.opened import OpenProject
from tunewright.road.serving import adapter_of

if TYPE_CHECKING:
    from tunewright.serving.state import Grounds, Release, State
    from tunewright.serving.state.meter import ShadowLine


@dataclass(frozen=True)
class DeployResult:
    """What became of a wish to release an adapter."""

    release: Release | None
    """None: its verdict is not to ship, and nothing has changed."""
    verdict: Verdict | None
    """Of the adapter's newest evaluation; None: it has none, and was released all the same."""
    servers: int
    """That run on this state, and take it within a second."""

    def as_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        decided = {"decision": self.verdict.decision, "reasons": list(self.verdict.reasons)} if self.verdict else None
        release = self.release.as_dict() if self.release else None
        return {"release": release, "verdict": decided, "servers": self.servers}


class ReleasesRoad:
    """What can be done with aliases.

    Args:
        check_ledger: raises a UserError if the record of test openings, by which verdicts are read, is not whole.
    """

    def __init__(self, opened: OpenProject, check_ledger: Callable[[], object]) -> None:
        self._opened = opened
        self._check_ledger = check_ledger

    def deploy(
        self,
        alias: str,
        adapter: str,
        *,
        canary: float | None = None,
        shadow: bool = False,
        because: str | None = None,
    ) -> DeployResult:
        """Have an alias answer with an adapter, of which an evaluation says *ship*.

        Args:
            alias: a name that tenants ask for; it is made where it is not there yet.
            adapter: its name, or the beginning of it.
            canary: the share of the traffic, above 0 and below 1, that it answers beside what is there.
            shadow: it is asked what the alias is asked, and its answers are recorded and not given.
            because: why it is released whatever the verdict, which is kept.

        Raises:
            UserError: no such adapter, one that does not fit or was never evaluated, or it is there already.
        """
        from tunewright.serving.state import Candidate

        if canary is not None and shadow:
            raise UserError("a candidate is a canary or a shadow", where="--shadow", fix="Leave one of them out.")
        if because is not None and not because.strip():
            raise UserError("the reason is empty", where="--because")
        chosen = find_adapter(self._opened.project.adapters, adapter)
        decided, evaluation = self._judge(chosen, because)
        if because is None and decided is not None and decided.decision != "ship":
            return DeployResult(None, decided, 0)
        with self._opened.state() as state:
            self._require_servable(chosen, alias, state)
            grounds = _grounds(decided, evaluation, because)
            if canary is None and not shadow:
                made = state.releases.deploy(alias, chosen.name, chosen.digest, grounds)
            else:
                candidate = Candidate(chosen.name, chosen.digest, canary)
                made = state.releases.try_beside(alias, candidate, grounds)
            return DeployResult(made, decided, len(state.meter.servers()))

    def promote(self, alias: str) -> Release:
        """Have an alias answer with its candidate from now on.

        Raises:
            UserError: no such alias, or it has no candidate.
        """
        with self._opened.state() as state:
            return state.releases.promote(alias)

    def rollback(self, alias: str, number: int | None = None) -> Release:
        """Let an alias's candidate go; where there is none, bring back what it answered with before.

        Args:
            alias: whose.
            number: the release to bring back, in place of the one before.

        Raises:
            UserError: no such alias or release, nothing before, or an adapter that is no longer here.
        """
        with self._opened.state() as state:
            back = state.releases.rollback_target(alias, number)
            adapter_of(self._opened, back.adapter, back.digest)
            return state.releases.rollback(alias, number)

    def history(self, alias: str | None = None) -> list[Release]:
        """All releases (of one alias), the first one first.

        Raises:
            UserError: no such alias.
        """
        with self._opened.state() as state:
            return state.releases.history(alias)

    def shadow(self, alias: str) -> list[ShadowLine]:
        """What candidates in an alias's shadow were asked, and would have answered.

        Raises:
            UserError: no such alias.
        """
        with self._opened.state() as state:
            state.releases.history(alias)
            return state.meter.shadow_lines(alias)

    def _judge(self, adapter: Adapter, because: str | None) -> tuple[Verdict | None, str | None]:
        """The verdict of the adapter's newest evaluation, and that one's ID."""
        evidence = evidence_on(self._opened.project.evaluations, adapter.digest, self._opened.reporter)
        if evidence is None:
            if because is None:
                raise UserError(
                    f"{adapter.name} has not been evaluated",
                    where=str(self._opened.project.evaluations),
                    fix=f"`tunewright evaluate {adapter.name}` does it; or release it all the same, with --force "
                    '--because "why".',
                )
            return None, None
        self._check_ledger()
        return verdict(evidence), evidence.id

    def _require_servable(self, adapter: Adapter, alias: str, state: State) -> None:
        """Refuse what no server here could load beside the other releases."""
        require_fit(adapter, self._opened.base, self._opened.chat)
        require_batchable(adapter.folder)
        require_sound(adapter, TrustedKeys(self._opened.project.keys))
        recipe = self._opened.project.recipe
        if recipe.serve.quantize is None:
            others = [release for name, release in state.releases.live().items() if name != alias]
            beside = [adapter_of(self._opened, release.adapter, release.digest) for release in others]
            trained_quantize([adapter, *beside])


def _grounds(decided: Verdict | None, evaluation: str | None, because: str | None) -> Grounds:
    from tunewright.serving.state import Grounds

    return Grounds(decided.decision if decided else None, evaluation, because)
