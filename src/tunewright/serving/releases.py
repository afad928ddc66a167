"""Releases: an adapter is tested, then an alias points at it (``deploy``, ``promote``, ``rollback``, ``undeploy``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tunewright.adapters.registry import Adapter, find_adapter, trained_quantization
from tunewright.config import EngineName
from tunewright.core.errors import UserError
from tunewright.core.progress import duration
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.files import EVIDENCE_FILE, evidence_on
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import Verdict, verdict
from tunewright.open_project import OpenProject
from tunewright.serving.options import DeployOptions, ReleaseTestOptions
from tunewright.serving.serve import adapter_of, missing_evidence, open_state, require_servable, served_grammar

if TYPE_CHECKING:
    from tunewright.evidence.shadow import ShadowFinding
    from tunewright.gate.results import IsolationTest, ServingCheck
    from tunewright.serving.release_tests import EngineUnderTest, IsolationRunner
    from tunewright.serving.tenants import State
    from tunewright.serving.tenants.releases import Release
    from tunewright.serving.tenants.usage import ShadowLine


@dataclass(frozen=True)
class DeployResult:
    """The result of a request to release an adapter."""

    release: Release | None
    """The new release; None if the verdict, the isolation test or the serving check refused it: no alias has changed.
    """
    verdict: Verdict | None = None
    """The verdict of the adapter's newest evaluation; None if it was released without a verdict."""
    isolation: IsolationTest | None = None
    """The isolation test that decided; None if it was not run."""
    serving: ServingCheck | None = None
    """The serving check; None if it was not run."""
    servers: int = 0
    """Running servers that share this state and apply the release within a second."""

    @property
    def exit_code(self) -> int:
        """Exit code: 0 released; 3 refused by a measured *no*; 4 undecided."""
        if self.release is not None:
            return 0
        if self.serving is not None:
            return 3
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
            "serving": asdict(self.serving) if self.serving else None,
            "servers": self.servers,
        }


@dataclass(frozen=True)
class Releasable:
    """An adapter, and what its newest evaluation means for a release."""

    adapter: Adapter
    verdict: Verdict | None
    refusal: UserError | None
    """Why there is no verdict to decide by, and what to do."""

    @property
    def ships(self) -> bool:
        """True if the verdict allows a release."""
        return self.verdict is not None and self.verdict.decision == "ship"


def deploy(project: OpenProject, alias: str, adapter: str, options: DeployOptions = DeployOptions()) -> DeployResult:
    """Release an adapter for an alias if an evaluation says *ship*, and the isolation test and serving check pass.

    Args:
        alias: the name that tenants call; created if it does not exist.
        adapter: a name or its beginning.
        options: a trial on a part of the traffic, a reason to release regardless of the
            measurements, and what the alias adds.

    Raises:
        UserError: no such adapter, one that does not fit, was never evaluated or is already released, or an engine
            that is not installed or cannot hold it. With ``constrain``: the config has no constraint, or the
            adapter was not evaluated with it.
    """
    from tunewright.serving.tenants.releases import Candidate, Grounds

    because, system_prompt = options.because, options.system_prompt
    if options.canary is not None and options.shadow:
        raise UserError("--canary and --shadow are mutually exclusive", where="--shadow", fix="Choose one.")
    _require_reason(because, "--because")
    _require_reason(options.untested, "--untested")
    chosen = find_adapter(project.folder.adapters, adapter)
    # Checked before an evaluation is chosen: a changed file could hide its adapter, or that it is the newest.
    AccessLog(project.folder.evaluations).require_all()
    decided, evidence = _decide(project, chosen, because)
    grammar = _grammar(project, chosen, evidence, because) if options.constrain else None
    evaluation = evidence.id if evidence else None
    if because is None and decided is not None and decided.decision != "ship":
        return DeployResult(None, decided)
    candidate = None
    if options.shadow or options.canary is not None:
        candidate = Candidate(chosen.name, chosen.digest, options.canary, system_prompt, grammar)
    with open_state(project, make=True) as state:
        # Refuse invalid requests before the slow isolation test.
        if candidate is None:
            state.releases.require_deployable(
                alias, chosen.name, chosen.digest, system_prompt=system_prompt, grammar=grammar
            )
        else:
            state.releases.require_triable(alias, candidate)
        _require_servable_together(project, chosen, alias, state)
        test, check, passes = ReleaseGate(project, state, alias, chosen, options.engine).run(
            options, forced=because is not None
        )
        if not passes:
            return DeployResult(None, decided, test, check)
        grounds = Grounds(decided.decision if decided else None, evaluation, because, test, options.untested, check)
        if candidate is None:
            made = state.releases.deploy(
                alias, chosen.name, chosen.digest, grounds, system_prompt=system_prompt, grammar=grammar
            )
        else:
            made = state.releases.start_candidate(alias, candidate, grounds)
        return DeployResult(made, decided, test, check, len(state.quota.servers()))


def promote(project: OpenProject, alias: str, options: ReleaseTestOptions = ReleaseTestOptions()) -> DeployResult:
    """Make an alias's candidate its live release once the isolation test and the serving check have passed.

    The test is not repeated if nothing else was released since the candidate passed it; the check is not
    repeated for the same adapter and engine. A candidate that was forced needs to pass only the test.

    Args:
        alias: its name.
        options: the engine of the tests is by default the one that the candidate passed on, else the config's.

    Raises:
        UserError: no such alias, no candidate, a candidate that is missing here, or an engine that is not
            installed. Also if the evaluation that allowed the candidate was changed or removed.
    """
    _require_reason(options.untested, "--untested")
    with open_state(project) as state:
        before, candidate = state.releases.promotable(alias)
        chosen = adapter_of(project, candidate.adapter, candidate.digest)
        _require_servable_together(project, chosen, alias, state)
        if (evaluation := before.grounds.evaluation) is not None:
            AccessLog(project.folder.evaluations).require_all()
            folder = project.folder.evaluations / evaluation
            if not (folder / EVIDENCE_FILE).exists():
                raise UserError(
                    f"The evidence of evaluation {evaluation}, on which the candidate was released, is missing",
                    where=str(folder),
                    fix="Restore its folder, or deploy the adapter again.",
                )
        if options.engine is None and before.grounds.isolation is not None:
            options = replace(options, engine=cast("EngineName", before.grounds.isolation.engine))
        gate = ReleaseGate(project, state, alias, chosen, options.engine)
        test, check, passes = gate.run(options, forced=before.grounds.because is not None)
        if not passes:
            return DeployResult(None, None, test, check)
        shadow = _shadow_finding(project, alias) if candidate.share is None else None
        grounds = replace(before.grounds, isolation=test, untested=options.untested, serving=check, shadow=shadow)
        made = state.releases.promote(alias, grounds)
        return DeployResult(made, None, test, check, len(state.quota.servers()))


def _shadow_finding(project: OpenProject, alias: str) -> ShadowFinding:
    """Return what people's verdicts on a shadow's answers show now; warn if it is no reason to promote it."""
    from tunewright.evidence.shadow import nothing_found
    from tunewright.serving.shadow_review import status

    now = status(project, alias)
    found = nothing_found(now.margin) if now.finding is None else now.finding
    if found.outcome in ("worse", "can't tell"):
        why = "no unit is in its sequence yet" if not found.units else found.summary
        project.reporter.warn(f"{now.candidate} is promoted, and its shadow does not show that it is not worse: {why}.")
    return found


def rollback(project: OpenProject, alias: str, number: int | None = None) -> Release:
    """Discard an alias's candidate, or without a candidate restore the previous release.

    It does not wait for an isolation test, since the restored release passed its own.

    Args:
        alias: its name.
        number: the release to restore (None: the previous one).

    Raises:
        UserError: no such alias or release, no previous release, or an adapter that is missing here.
    """
    with open_state(project) as state:
        back = state.releases.rollback_target(alias, number)
        adapter_of(project, back.adapter, back.digest)
        if back.grounds.isolation is None:
            project.reporter.warn(
                f"Release {back.number} went live without the isolation test, and a rollback does not wait for it: "
                "`tunewright serve --self-test` tests what is live then."
            )
        return state.releases.rollback(alias, number)


def undeploy(project: OpenProject, alias: str, *, because: str | None = None) -> Release:
    """Stop answering on an alias; a rollback or a deploy restores it.

    Args:
        alias: its name.
        because: the reason; it is stored.

    Raises:
        UserError: no such alias, it is undeployed already, or an empty reason.
    """
    _require_reason(because, "--because")
    with open_state(project) as state:
        return state.releases.undeploy(alias, because)


def releases(project: OpenProject, alias: str | None = None) -> list[Release]:
    """Return all releases, or the releases of one alias, oldest first.

    Raises:
        UserError: no such alias.
    """
    with open_state(project) as state:
        return state.releases.history(alias)


def shadow(project: OpenProject, alias: str) -> list[ShadowLine]:
    """Return the requests copied to an alias's shadow candidates, and their answers.

    Raises:
        UserError: no such alias.
    """
    with open_state(project) as state:
        state.releases.history(alias)
        return state.usage.shadow_lines(alias)


def releasable(project: OpenProject, adapters: Sequence[Adapter]) -> list[Releasable]:
    """Return the verdict that :meth:`deploy` would decide by, for each of these adapters.

    Raises:
        UserError: the access log was changed.
    """
    AccessLog(project.folder.evaluations).require_all()
    found = []
    for adapter in adapters:
        try:
            found.append(Releasable(adapter, _decide(project, adapter, None)[0], None))
        except UserError as error:
            found.append(Releasable(adapter, None, error))
    return found


def _decide(project: OpenProject, adapter: Adapter, because: str | None) -> tuple[Verdict | None, Evidence | None]:
    """Return the verdict of the adapter's newest evaluation, and its evidence."""
    evidence = evidence_on(project.folder.evaluations, adapter.digest, project.reporter)
    if evidence is None:
        if because is None:
            raise UserError(
                f"{adapter.name} has no verdict on the test split, and one on dev does not allow a release",
                where=str(project.folder.evaluations),
                fix=f'Run `tunewright evaluate {adapter.name}`, or release it anyway with --force --because "why".',
            )
        return None, None
    access_log = AccessLog(project.folder.evaluations)
    removed = access_log.removed_since(str(evidence.lineage["created"]), adapter.digest)
    if removed and because is None:
        raise UserError(
            f"The evidence of evaluation {removed[-1]} of {adapter.name} is missing, and it is newer than that of "
            f"{evidence.id}",
            where=str(access_log.path),
            fix=f"Restore its folder, or run `tunewright evaluate {adapter.name}` with the config that it had.",
        )
    return verdict(evidence), evidence


def _grammar(project: OpenProject, adapter: Adapter, evidence: Evidence | None, because: str | None) -> str:
    """Return the rule of the config's constraint, with which the adapter was evaluated.

    A forced release may be without that evidence, with a warning.
    """
    grammar = served_grammar(project)
    missing = missing_evidence(adapter.name, evidence, grammar)
    if missing is not None and because is None:
        raise UserError(
            missing, where="--constrain", fix=f"Run `tunewright evaluate {adapter.name}` with this constraint."
        )
    if missing is not None:
        project.reporter.warn(f"{missing}. The release constrains its answers all the same: it was forced.")
    return grammar.rule


def _require_servable_together(project: OpenProject, adapter: Adapter, alias: str, state: State) -> None:
    """Refuse an adapter that no server here could load together with the other releases."""
    require_servable(project, adapter)
    if project.folder.config.serve.quantization is None:
        others = [release for name, release in state.releases.live().items() if name != alias]
        beside = [adapter_of(project, release.adapter, release.digest) for release in others]
        trained_quantization([adapter, *beside])


def _require_reason(reason: str | None, where: str) -> None:
    if reason is not None and not reason.strip():
        raise UserError("The reason is empty", where=where, fix="State the reason: it is stored with the release.")


class ReleaseGate:
    """The isolation test and the serving check that a release must pass before it goes live."""

    def __init__(
        self, project: OpenProject, state: State, alias: str, adapter: Adapter, engine: EngineName | None
    ) -> None:
        from tunewright.serving.release_tests import IsolationRunner, engines_under_test

        self._project = project
        self._state = state
        self._alias = alias
        self._adapter = adapter
        own, others = self._live()
        self._own = {adapter.name, *(each.name for each in own)}
        adapters = {each.digest: each for each in (*others, *own, adapter)}.values()
        config = project.folder.config
        held = config.serve.quantization or trained_quantization(list(adapters))
        engines = engines_under_test(project, held, engine or config.serve.engine)
        named = {each.name: each.folder for each in adapters}
        self._tests = [IsolationRunner(on, named, config.serve.spare_adapters) for on in engines]

    def run(
        self, options: ReleaseTestOptions, *, forced: bool
    ) -> tuple[IsolationTest | None, ServingCheck | None, bool]:
        """Return the isolation test and the serving check, unless skipped, and whether the release may go live.

        A refusal is audited. A forced release may fail the serving check, but not the isolation test.
        """
        releases, alias, adapter, warn = self._state.releases, self._alias, self._adapter, self._project.reporter.warn
        if options.untested is not None:
            for runner in self._tests:
                failed = releases.refused(runner.subject)
                if failed is not None and failed.verdict == "not isolated":
                    raise UserError(
                        f"The same adapters failed the isolation test on {failed.tested[:16].replace('T', ' ')}: "
                        + "; ".join(failed.reasons),
                        where="--untested",
                        fix="Omit --untested to test them again.",
                    )
            warn(f"{alias} is released without the isolation test and the serving check.")
            return None, None, True
        test, passes = self.require_isolation()
        if not passes:
            releases.refuse(alias, adapter.name, adapter.digest, test)
            return test, None, False
        check = self.serving_check()
        if not check.passes and forced:
            warn(f"{alias} is released although the serving check failed: it was forced.")
        elif not check.passes:
            releases.refuse_served(alias, adapter.name, check)
        return test, check, check.passes or forced

    def require_isolation(self) -> tuple[IsolationTest, bool]:
        """Test all adapters that are in memory together during the switch, unless this set has already passed.

        The second value is whether the release may go live; if there are several engines, the first
        engine that does not allow it decides.
        """
        for runner in self._tests:
            test, passes = self._isolation_on(runner)
            if not passes:
                break
        return test, passes

    def _isolation_on(self, runner: IsolationRunner) -> tuple[IsolationTest, bool]:
        from tunewright.gate.prompts import isolation_prompts

        say = self._project.reporter.say
        known = self._state.releases.passed(runner.subject)
        if known is not None and not self._across(known):
            say(
                f"Isolation test: passed for exactly these on {known.tested[:16].replace('T', ' ')} (base, "
                f"{len(known.adapters)} adapters, engine {known.engine} and versions are the same), and not run again."
            )
            return known, True
        count = len(runner.folders)
        say(f"Isolation test on {runner.on.title}: the base and {count} adapter{'' if count == 1 else 's'}")
        test = runner.record(isolation_prompts(self._project))
        say(f"Isolation test: {test.summary}, {duration(test.seconds)}")
        passes = test.verdict != "not isolated" and not self._across(test)
        if passes:
            for one, other in test.alike:
                self._project.reporter.warn(
                    f"{one} and {other} give the same answers to all probes: the test would not notice if one "
                    "answered for the other."
                )
        return test, passes

    def serving_check(self) -> ServingCheck:
        """Compare the adapter's answers through the engine with the trained model's, unless that was done before."""
        for test in self._tests:
            check = self._serving_check_on(test.on)
            if check.reasons:
                break
        return check

    def _serving_check_on(self, engine: EngineUnderTest) -> ServingCheck:
        from tunewright.gate.prompts import serving_probe
        from tunewright.serving.release_tests import ServingCheckRunner

        say = self._project.reporter.say
        runner = ServingCheckRunner(engine, self._adapter, serving_probe(self._project))
        known = self._state.releases.checked(runner.subject)
        if known is not None:
            say(f"Serving check: {known.summary} on {known.checked[:16].replace('T', ' ')}, and not run again.")
            return known
        say(f"Serving check on {engine.title}: {len(runner.probe.prompts)} prompts")
        check = runner.run()
        say(f"Serving check: {check.summary}, {duration(check.seconds)}")
        return check

    def _live(self) -> tuple[list[Adapter], list[Adapter]]:
        """Return the alias's current and candidate adapters that exist here, and the other aliases' adapters."""
        own: list[Adapter] = []
        others: list[Adapter] = []
        for alias, release in self._state.releases.live().items():
            for name, digest in release.adapters:
                try:
                    found = adapter_of(self._project, name, digest)
                except UserError as error:
                    if alias != self._alias or digest == self._adapter.digest:
                        raise
                    self._project.reporter.warn(f"{error} The isolation test does without it.")
                    continue
                (own if alias == self._alias else others).append(found)
        return own, others

    def _across(self, test: IsolationTest) -> list[tuple[str, str]]:
        """Return indistinguishable pairs of the new adapter and an adapter of another alias."""
        return [pair for pair in test.alike if self._adapter.name in pair and not set(pair) <= self._own]
