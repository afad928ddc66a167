"""The tests of a release before it goes live: isolation (also by ``tunewright serve --self-test``) and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunewright.adapters.compatibility import trained_quantization
from tunewright.adapters.registry import Adapter
from tunewright.config import EngineName
from tunewright.core.errors import UserError
from tunewright.core.progress import duration
from tunewright.open_project import OpenProject
from tunewright.serving.options import ServeOptions
from tunewright.serving.served_adapters import adapter_of, all_served

if TYPE_CHECKING:
    from tunewright.gate.results import IsolationResult
    from tunewright.serving.release_tests import EngineUnderTest, IsolationRunner
    from tunewright.serving.tenants import IsolationTest, ServingCheck, State


def self_test(
    project: OpenProject,
    adapters: Sequence[str] = (),
    options: ServeOptions = ServeOptions(),
) -> IsolationResult:
    """Run the isolation test on the base and the adapters that :meth:`serve` would serve.

    The prompts are dev items of the current version, if there is one, and general questions. With ``serve.engines``
    each engine is tested; the result is that of the first one that is not isolated, or of the last one. Of the options,
    only the engine has an effect.

    Raises:
        UserError: as for :meth:`serve`, or no adapter.
    """
    from tunewright.gate.prompts import isolation_prompts
    from tunewright.serving.release_tests import IsolationRunner, engines_under_test

    config = project.folder.config
    held, folders, spare = all_served(project, adapters)
    prompts = isolation_prompts(project)
    for on in engines_under_test(project, held, options.engine or config.serve.engine):
        result = IsolationRunner(on, folders, spare).run(prompts)
        if on.remote is not None:
            project.reporter.say(f"{on.config.serve.engines[0]}: {result.verdict}")
        if result.verdict == "not isolated":
            break
    return result


class ReleaseGate:
    """The isolation test and the serving check that a release must pass before it goes live.

    Args:
        alias: the alias that receives ``adapter``, live or as a candidate.
        engine: the engine under test (None: the config's, which serves).

    Raises:
        UserError: a live adapter is missing here, or was trained with another quantization of the base.
    """

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

    def require_isolation(self) -> tuple[IsolationTest, bool]:
        """Test all adapters that are in memory together during the switch, unless this set has already passed.

        Returns:
            The test, and whether the release may go live; of several engines the first one that does not allow it.
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

    def require_not_failed(self) -> None:
        """Refuse to skip the test if this set has failed it.

        Raises:
            UserError: this set failed, and has not passed since.
        """
        for test in self._tests:
            failed = self._state.releases.refused(test.subject)
            if failed is not None and failed.verdict == "not isolated":
                raise UserError(
                    f"The same adapters failed the isolation test on {failed.tested[:16].replace('T', ' ')}: "
                    + "; ".join(failed.reasons),
                    where="--untested",
                    fix="Omit --untested to test them again.",
                )

    def _live(self) -> tuple[list[Adapter], list[Adapter]]:
        """Return the alias's current and candidate adapters that exist here, and those of the other aliases."""
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
