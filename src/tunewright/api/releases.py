"""The verbs on releases: ``tunewright deploy``, ``promote``, ``rollback``, ``undeploy``, ``releases``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tunewright.adapters.compatibility import require_compatible, trained_quantize
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.trust import require_trusted
from tunewright.adapters.vllm_compat import require_batchable
from tunewright.api.context import ProjectContext
from tunewright.api.serving import adapter_of
from tunewright.config import EngineName
from tunewright.core.errors import UserError
from tunewright.evidence.schema import evidence_on
from tunewright.evidence.verdict import Verdict, verdict

if TYPE_CHECKING:
    from tunewright.serving.tenants import IsolationTest, Release, State
    from tunewright.serving.tenants.usage import ShadowLine


@dataclass(frozen=True)
class DeployResult:
    """What became of a wish to release an adapter."""

    release: Release | None
    """None: its verdict is not to ship, or it did not pass the isolation test, and no alias has changed."""
    verdict: Verdict | None = None
    """Of the adapter's newest evaluation; None: it has none, and was released all the same."""
    isolation: IsolationTest | None = None
    """The test that decided; None: it was not run."""
    servers: int = 0
    """That run on this state, and take it within a second."""

    @property
    def exit_code(self) -> int:
        """0: released; 3: a measured no; 4: it can't be told."""
        if self.release is not None:
            return 0
        if self.isolation is not None:
            return 3 if self.isolation.verdict == "not isolated" else 4
        assert self.verdict is not None
        return self.verdict.exit_code

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        decided = self.verdict.as_dict() if self.verdict else None
        return {
            "release": self.release.as_dict() if self.release else None,
            "verdict": decided,
            "isolation": asdict(self.isolation) if self.isolation else None,
            "servers": self.servers,
        }


class ReleasesApi:
    """What can be done with aliases.

    Args:
        check_ledger: raises a UserError if the record of test openings, by which verdicts are read, is not whole.
    """

    def __init__(self, opened: ProjectContext, check_ledger: Callable[[], object]) -> None:
        self._context = opened
        self._check_ledger = check_ledger

    def deploy(
        self,
        alias: str,
        adapter: str,
        *,
        canary: float | None = None,
        shadow: bool = False,
        because: str | None = None,
        engine: EngineName | None = None,
        untested: str | None = None,
        system_prompt: bool = True,
    ) -> DeployResult:
        """Have an alias answer with an adapter, of which an evaluation says *ship*, once the isolation test has passed.

        Args:
            alias: a name that tenants ask for; it is made where it is not there yet.
            adapter: its name, or the beginning of it.
            canary: the share of the traffic, above 0 and below 1, that it answers beside what is there.
            shadow: it is asked what the alias is asked, and its answers are recorded and not given.
            because: why it is released whatever the verdict, which is kept.
            engine: on which the isolation test runs (None: the config's, which serves).
            untested: why it is released without that test, which is kept.
            system_prompt: requests without a system message get the one that the adapter was trained with; False
                leaves them as they came.

        Raises:
            UserError: no such adapter, one that does not fit or was never evaluated, it is there already, or an engine
                that is not installed or cannot hold it.
        """
        from tunewright.serving.tenants import Candidate, Grounds

        if canary is not None and shadow:
            raise UserError("a candidate is a canary or a shadow", where="--shadow", fix="Leave one of them out.")
        _require_reason(because, "--because")
        _require_reason(untested, "--untested")
        chosen = find_adapter(self._context.folder.adapters, adapter)
        decided, evaluation = self._judge(chosen, because)
        if because is None and decided is not None and decided.decision != "ship":
            return DeployResult(None, decided)
        candidate = None
        if shadow or canary is not None:
            candidate = Candidate(chosen.name, chosen.digest, canary, system_prompt)
        with self._context.state(make=True) as state:
            # What would be refused anyway is refused before a test that takes its time.
            if candidate is None:
                state.releases.require_deployable(alias, chosen.name, chosen.digest, system_prompt=system_prompt)
            else:
                state.releases.require_triable(alias, candidate)
            self._require_servable(chosen, alias, state)
            test, passes = self._tested(state, alias, chosen, engine, untested)
            if not passes:
                return DeployResult(None, decided, test)
            grounds = Grounds(decided.decision if decided else None, evaluation, because, test, untested)
            if candidate is None:
                made = state.releases.deploy(alias, chosen.name, chosen.digest, grounds, system_prompt=system_prompt)
            else:
                made = state.releases.try_candidate(alias, candidate, grounds)
            return DeployResult(made, decided, test, len(state.quota.servers()))

    def promote(self, alias: str, *, engine: EngineName | None = None, untested: str | None = None) -> DeployResult:
        """Have an alias answer with its candidate from now on, once the isolation test has passed.

        It has where nothing else was released since the candidate came, and is not run again then.

        Args:
            alias: whose.
            engine: on which the isolation test runs (None: the one that the candidate passed it on, else the config's).
            untested: why it is promoted without that test, which is kept.

        Raises:
            UserError: no such alias, it has no candidate, one that is not here, or an engine that is not installed.
        """
        _require_reason(untested, "--untested")
        with self._context.state() as state:
            before, candidate = state.releases.promotable(alias)
            chosen = adapter_of(self._context, candidate.adapter, candidate.digest)
            self._require_servable(chosen, alias, state)
            if engine is None and before.grounds.isolation is not None:
                engine = cast("EngineName", before.grounds.isolation.engine)
            test, passes = self._tested(state, alias, chosen, engine, untested)
            if not passes:
                return DeployResult(None, None, test)
            made = state.releases.promote(alias, replace(before.grounds, isolation=test, untested=untested))
            return DeployResult(made, None, test, len(state.quota.servers()))

    def _tested(
        self, state: State, alias: str, adapter: Adapter, engine: EngineName | None, untested: str | None
    ) -> tuple[IsolationTest | None, bool]:
        """The isolation test, unless it is left out, and whether the release may go live; if not, the audit has it."""
        from tunewright.api.isolation import IsolationGate

        gate = IsolationGate(self._context, state, alias, adapter, engine)
        if untested is not None:
            gate.require_not_failed()
            self._context.reporter.warn(f"{alias} goes live without the isolation test.")
            return None, True
        test, passes = gate.pass_or_refuse()
        if not passes:
            state.releases.refuse(alias, adapter.name, adapter.digest, test)
        return test, passes

    def rollback(self, alias: str, number: int | None = None) -> Release:
        """Let an alias's candidate go; where there is none, bring back what it answered with before.

        That is the way out, and does not wait for an isolation test: what is brought back had its own.

        Args:
            alias: whose.
            number: the release to bring back, in place of the one before.

        Raises:
            UserError: no such alias or release, nothing before, or an adapter that is no longer here.
        """
        with self._context.state() as state:
            back = state.releases.rollback_target(alias, number)
            adapter_of(self._context, back.adapter, back.digest)
            if back.grounds.isolation is None:
                self._context.reporter.warn(
                    f"Release {back.number} went live without the isolation test, and a rollback does not wait for it: "
                    "`tunewright serve --self-test` tests what is live then."
                )
            return state.releases.rollback(alias, number)

    def undeploy(self, alias: str, *, because: str | None = None) -> Release:
        """Have an alias answer nothing from now on; a rollback or a deploy brings it back.

        Args:
            alias: whose.
            because: why, which is kept.

        Raises:
            UserError: no such alias, it is undeployed already, or an empty reason.
        """
        _require_reason(because, "--because")
        with self._context.state() as state:
            return state.releases.undeploy(alias, because)

    def history(self, alias: str | None = None) -> list[Release]:
        """Return all releases (of one alias), the first one first.

        Raises:
            UserError: no such alias.
        """
        with self._context.state() as state:
            return state.releases.history(alias)

    def shadow(self, alias: str) -> list[ShadowLine]:
        """Return what candidates in an alias's shadow were asked, and would have answered.

        Raises:
            UserError: no such alias.
        """
        with self._context.state() as state:
            state.releases.history(alias)
            return state.usage.shadow_lines(alias)

    def _judge(self, adapter: Adapter, because: str | None) -> tuple[Verdict | None, str | None]:
        """Return the verdict of the adapter's newest evaluation, and that one's ID."""
        evidence = evidence_on(self._context.folder.evaluations, adapter.digest, self._context.reporter)
        if evidence is None:
            if because is None:
                raise UserError(
                    f"{adapter.name} has not been evaluated on the test split, and a dev verdict is no licence to ship",
                    where=str(self._context.folder.evaluations),
                    fix=f"`tunewright evaluate {adapter.name}` does it; or release it all the same, with --force "
                    '--because "why".',
                )
            return None, None
        self._check_ledger()
        return verdict(evidence), evidence.id

    def _require_servable(self, adapter: Adapter, alias: str, state: State) -> None:
        """Refuse what no server here could load beside the other releases."""
        require_compatible(adapter, self._context.base, self._context.chat)
        require_batchable(adapter.folder)
        require_trusted(adapter, TrustedKeys(self._context.folder.keys))
        config = self._context.folder.config
        if config.serve.quantization is None:
            others = [release for name, release in state.releases.live().items() if name != alias]
            beside = [adapter_of(self._context, release.adapter, release.digest) for release in others]
            trained_quantize([adapter, *beside])


def _require_reason(reason: str | None, where: str) -> None:
    if reason is not None and not reason.strip():
        raise UserError("the reason is empty", where=where, fix="Write why: it is kept with the release.")
