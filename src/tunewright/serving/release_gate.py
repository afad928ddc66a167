"""The tests of a release before it goes live: isolation (also by ``tunewright serve --self-test``) and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunewright.adapters.compatibility import trained_quantization
from tunewright.adapters.registry import Adapter
from tunewright.config import Config, EngineName
from tunewright.core.errors import UserError
from tunewright.core.progress import duration
from tunewright.open_project import OpenProject
from tunewright.serving.options import ServeOptions
from tunewright.serving.project_state import open_state
from tunewright.serving.served_adapters import adapter_of, choose_served, refuse_names, released

if TYPE_CHECKING:
    from tunewright.gate.results import IsolationResult
    from tunewright.serving.tenants import IsolationTest, ServingCheck, State


def self_test(
    project: OpenProject,
    adapters: Sequence[str] = (),
    options: ServeOptions = ServeOptions(),
) -> IsolationResult:
    """Run the isolation test on the base and the adapters that :meth:`serve` would serve.

    If the number of replicas follows the load, the largest number is tested. Options other than the engine and its
    replicas have no effect.

    The probes are dev items of the current version, if there is one, and general questions.

    Raises:
        UserError: as for :meth:`serve`, or no adapter.
    """
    from tunewright.gate.prompts import isolation_prompts
    from tunewright.serving.engines.scaling import largest_number
    from tunewright.serving.release_tests import EngineUnderTest, IsolationRunner

    folder, config = project.folder, project.folder.config
    number = largest_number(
        options.replicas or config.serve.replicas, options.max_replicas or config.serve.max_replicas
    )
    config = _with_replicas(config, number)
    held, folders, spare = None, {}, 0
    if config.serve.database_url is not None or folder.serving_state.exists():
        with open_state(project) as state:
            if state.tenants.any():
                refuse_names(adapters)
                held, live = released(project, state)
                folders = {adapter.name: adapter.folder for adapter in live}
                spare = config.serve.spare_adapters
    if held is None:
        held, folders = choose_served(project, adapters)
    on = EngineUnderTest(project, config, held, options.engine or config.serve.engine)
    return IsolationRunner(on, folders, spare).run(isolation_prompts(project))


def _with_replicas(config: Config, replicas: int, *, limited: bool = True) -> Config:
    """Return the config with this number of replicas, and without a limit of their adapters unless it is kept."""
    limit = config.serve.adapters_per_replica if limited else None
    fixed = {"replicas": replicas, "max_replicas": None, "adapters_per_replica": limit}
    serve = config.serve.model_copy(update=fixed)
    return config.model_copy(update={"serve": serve})


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
        from tunewright.serving.release_tests import EngineUnderTest, IsolationRunner

        self._project = project
        self._state = state
        self._alias = alias
        self._adapter = adapter
        own, others = self._live()
        self._own = {adapter.name, *(each.name for each in own)}
        adapters = {each.digest: each for each in (*others, *own, adapter)}.values()
        # One engine: all replicas are alike, and the server's own ones are running.
        config = _with_replicas(project.folder.config, 1, limited=False)
        held = config.serve.quantization or trained_quantization(list(adapters))
        self._engine = EngineUnderTest(project, config, held, engine or config.serve.engine)
        named = {each.name: each.folder for each in adapters}
        self._test = IsolationRunner(self._engine, named, config.serve.spare_adapters)

    def require_isolation(self) -> tuple[IsolationTest, bool]:
        """Test all adapters that are in memory together during the switch, unless this set has already passed.

        Returns:
            The test, and whether the release may go live.
        """
        from tunewright.gate.prompts import isolation_prompts

        say = self._project.reporter.say
        known = self._state.releases.passed(self._test.subject)
        if known is not None and not self._across(known):
            say(
                f"Isolation test: passed for exactly these on {known.tested[:16].replace('T', ' ')} (base, "
                f"{len(known.adapters)} adapters, engine {known.engine} and versions are the same), and not run again."
            )
            return known, True
        count = len(self._test.folders)
        say(f"Isolation test on {self._engine.kind}: the base and {count} adapter{'' if count == 1 else 's'}")
        test = self._test.record(isolation_prompts(self._project))
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
        from tunewright.gate.prompts import serving_probe
        from tunewright.serving.release_tests import ServingCheckRunner

        say = self._project.reporter.say
        runner = ServingCheckRunner(self._engine, self._adapter, serving_probe(self._project))
        known = self._state.releases.checked(runner.subject)
        if known is not None:
            say(f"Serving check: {known.summary} on {known.checked[:16].replace('T', ' ')}, and not run again.")
            return known
        say(f"Serving check on {self._engine.kind}: {len(runner.probe.prompts)} prompts")
        check = runner.run()
        say(f"Serving check: {check.summary}, {duration(check.seconds)}")
        return check

    def require_not_failed(self) -> None:
        """Refuse to skip the test if this set has failed it.

        Raises:
            UserError: this set failed, and has not passed since.
        """
        failed = self._state.releases.refused(self._test.subject)
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
