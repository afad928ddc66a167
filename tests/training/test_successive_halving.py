"""Successive halving against a brute-force reference, with budgets, stops and diverging trials."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config import PRESETS, TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, duration
from tunewright.training.monitoring import DivergedError
from tunewright.training.sweep.ledger import LEDGER, Head, Ledger
from tunewright.training.sweep.successive_halving import (
    Outcome,
    Progress,
    SuccessiveHalving,
    Trial,
    default_rates,
    halving_rungs,
    make_trials,
    suggested_rate,
)

STEP, LOAD = 2.0, 30.0  # a second for each of the two target modules of the preset classic


def _trials(count: int) -> list[Trial]:
    return [Trial(f"t{n}", TrainConfig(learning_rate=1e-4 * (n + 1))) for n in range(count)]


def _head(trials: list[Trial], rungs: tuple[int, ...]) -> Head:
    return Head(
        sweep="s",
        dataset="d",
        base="b",
        template="t",
        metric=None,
        steps=rungs[-1],
        rungs=rungs,
        trials={t.name: {} for t in trials},
    )


class World:
    """Trials with known times and losses; it records requests."""

    def __init__(self, losses: dict[tuple[str, int], float]) -> None:
        self.losses = losses
        self.now = 0.0
        self.at: dict[str, int] = {}
        self.calls: list[tuple[str, int]] = []
        self.stop_before = math.inf
        self.slow: dict[tuple[str, int], float] = {}

    def train(self, trials: Sequence[Trial], step: int) -> Generator[Outcome, None, None]:
        for trial in trials:
            if len(self.calls) >= self.stop_before:
                raise KeyboardInterrupt
            self.calls.append((trial.name, step))
            made = step - self.at.get(trial.name, 0)
            assert made > 0, "no step is made twice"
            self.at[trial.name] = step
            own = made * len(trial.train.target_modules)
            seconds = LOAD + own + self.slow.get((trial.name, step), 0.0)
            self.now += seconds
            loss = self.losses.get((trial.name, step), 1.0)
            diverged = math.isnan(loss)
            yield Outcome(DivergedError("the loss is nan") if diverged else Progress(made, own, loss, None), seconds)

    def halving(
        self, folder: Path, trials: list[Trial], rungs: tuple[int, ...], budget: float | None, at_once: int = 1
    ) -> SuccessiveHalving:
        ledger = Ledger(folder, _head(trials, rungs))
        return SuccessiveHalving(trials, rungs, ledger, self.train, budget, LogReporter(), lambda: self.now, at_once)


def _brute_force(
    names: list[str], rungs: tuple[int, ...], losses: dict[tuple[str, int], float]
) -> tuple[str, list[tuple[str, int]]]:
    """Write the schedule out: all trials, then the better half, and so on."""
    calls = []
    for rung in rungs:
        calls += [(name, rung) for name in names]
        names = sorted(names, key=lambda name: losses[name, rung])
        names = names[: max(1, len(names) // 2)] if rung != rungs[-1] else names[:1]
    return names[0], calls


@given(st.integers(1, 13), st.integers(1, 200), st.randoms(use_true_random=False))
@examples(25)  # every line of the ledger is synced to disk
def test_sweep_follows_the_written_out_schedule(
    tmp_path_factory: pytest.TempPathFactory, n: int, steps: int, rng: Random
) -> None:
    trials, rungs = _trials(n), halving_rungs(n, steps)
    losses = {(t.name, rung): rng.random() for t in trials for rung in rungs}
    world = World(losses)
    winner = world.halving(tmp_path_factory.mktemp("sweep"), trials, rungs, None).run()
    expected, calls = _brute_force([t.name for t in trials], rungs, losses)
    assert (winner.name if winner else None, world.calls) == (expected, calls)


def test_halving_compares_six_trials_after_a_quarter_and_a_half() -> None:
    assert halving_rungs(6, 100) == (25, 50, 100)
    assert halving_rungs(6, 2) == (1, 2)
    assert halving_rungs(1, 7) == (7,)


@given(st.floats(100, 6000), st.integers(1, 4), st.randoms(use_true_random=False))
@examples(30)
def test_sweep_keeps_the_budget_and_runs_as_many_trials_as_fit(
    tmp_path_factory: pytest.TempPathFactory, budget: float, at_once: int, rng: Random
) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    losses = {(t.name, rung): rng.random() for t in trials for rung in rungs}
    world = World(losses)
    halving = world.halving(tmp_path_factory.mktemp("sweep"), trials, rungs, budget, at_once)

    def cost(count: int) -> float:
        """By hand, at the first rung's seconds a step: 30 steps each, 30 more for half of them, 60 for one."""
        return (count * 30 + max(1, count // 2) * 30 + 60) * (LOAD + 30 * STEP) / 30

    fit = [count for count in range(1, 7) if cost(count) <= budget]
    if not fit:
        with pytest.raises(UserError, match=f"{duration(cost(1))} in total"):
            halving.run()
        assert world.calls == [("t0", 30)], "its first rung shows how long a step takes"
        return
    winner = halving.run()
    assert world.now <= budget
    run = [t.name for t in trials[: max(fit)]]
    expected, calls = _brute_force(run, rungs, losses)
    assert winner is not None
    assert (winner.name, world.calls) == (expected, calls)
    left_out = [e.trial for e in halving.ledger.entries if e.event == "left out"]
    assert left_out == [t.name for t in trials[max(fit) :]]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.randoms(use_true_random=False))
@examples(15)
def test_stopped_sweep_resumes_without_repeating_work(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], rng: Random
) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 40)
    losses = {(t.name, rung): rng.random() for t in trials for rung in rungs}
    world, folder = World(losses), tmp_path_factory.mktemp("sweep")
    for stop in stops:
        world.stop_before = len(world.calls) + stop
        try:
            winner = world.halving(folder, trials, rungs, None).run()
        except KeyboardInterrupt:
            continue
        break
    world.stop_before = math.inf
    winner = world.halving(folder, trials, rungs, None).run()
    expected, calls = _brute_force([t.name for t in trials], rungs, losses)
    assert (winner.name if winner else None, world.calls) == (expected, calls)


def test_larger_budget_resumes_with_the_trials_left_out(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    losses = {(t.name, rung): 6.0 - n for n, t in enumerate(trials) for rung in rungs}
    world = World(losses)
    first = world.halving(tmp_path, trials, rungs, 800).run()
    assert first is not None and first.name == "t3"
    calls = list(world.calls)
    again = world.halving(tmp_path, trials, rungs, 800).run()
    assert again == first and world.calls == calls
    later = world.halving(tmp_path, trials, rungs, None).run()
    assert later is not None and later.name == "t5"
    assert world.calls[: len(calls)] == calls


def test_winner_is_returned_again_though_it_ran_over_the_budget(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    world = World({})
    world.slow["t0", 120] = 60
    for budget in (370, 370, 100):
        assert world.halving(tmp_path, trials, rungs, budget).run() == trials[0]
    assert world.now == 390
    assert world.calls == [("t0", 30), ("t0", 60), ("t0", 120)]


def test_trial_that_is_slower_than_estimated_is_left_out_of_a_later_rung(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    world = World({})
    world.slow["t0", 60] = 200
    halving = world.halving(tmp_path, trials, rungs, 370)
    assert halving.run() is None
    assert [(e.event, e.trial, e.rung) for e in halving.ledger.entries][-1] == ("left out", "t0", 3)
    assert world.halving(tmp_path, trials, rungs, 1000).run() == trials[0]


def test_budget_does_not_count_loading_in_the_pace_of_an_old_ledger(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    world = World({})
    Ledger(tmp_path, _head(trials, rungs)).add("timed", "t0", 0, 5, seconds=1010.0, steps=5, training_seconds=10.0)
    world.at["t0"] = 5
    halving = world.halving(tmp_path, trials, rungs, 2500)
    assert halving.run() == trials[0]
    assert "left out" not in [entry.event for entry in halving.ledger.entries]


@pytest.mark.parametrize("budget", [1100, 2000, 4000, None])
def test_budget_is_kept_at_the_pace_of_the_trials_with_most_target_modules(
    tmp_path: Path, budget: float | None
) -> None:
    trials, rungs = make_trials(TrainConfig(learning_rate=1e-3), [1e-3, 2e-3, 4e-3]), halving_rungs(6, 120)
    world = World({})
    assert world.halving(tmp_path, trials, rungs, budget).run() is not None
    first = "classic-0.001" if budget is None else "all-linear-0.002"
    assert world.calls[0] == (first, 30)
    assert budget is None or world.now <= budget


def test_trials_that_diverge_use_up_the_budget(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 120)
    world = World({(t.name, 30): math.nan for t in trials})
    for _ in range(2):
        halving = world.halving(tmp_path, trials, rungs, 200)
        assert halving.run() is None
        assert world.calls == [("t0", 30), ("t1", 30), ("t2", 30)]
    assert [e.trial for e in halving.ledger.entries if e.event == "left out"] == ["t3", "t4", "t5"]


def test_trial_with_a_non_finite_loss_is_out(tmp_path: Path) -> None:
    trials, rungs = _trials(6), halving_rungs(6, 40)
    losses = {("t0", 10): math.nan, ("t1", 10): math.nan, ("t5", 10): 0.5, ("t4", 10): 0.6}
    losses |= {("t5", 20): math.nan, ("t4", 20): 0.4}
    world = World(losses)
    winner = world.halving(tmp_path, trials, rungs, None).run()
    assert winner is not None and winner.name == "t4"
    assert [name for name, step in world.calls if step == 20] == ["t5", "t4", "t2"]
    again = World(losses)
    assert again.halving(tmp_path, trials, rungs, None).run() == winner
    assert again.calls == []


def test_ledger_records_events_and_is_append_only(tmp_path: Path) -> None:
    trials, rungs = _trials(3), halving_rungs(3, 40)
    world = World({("t0", 20): 0.3, ("t1", 20): 0.1, ("t2", 20): 0.2})
    world.stop_before = 2
    with pytest.raises(KeyboardInterrupt):
        world.halving(tmp_path, trials, rungs, None).run()
    before = (tmp_path / LEDGER).read_text()
    world.stop_before = math.inf
    world.halving(tmp_path, trials, rungs, None).run()
    after = (tmp_path / LEDGER).read_text()
    assert after.startswith(before)
    message = [json.loads(line) for line in after.splitlines()[1:]]
    assert [(e["event"], e["trial"]) for e in message] == [
        ("measured", "t0"),
        ("measured", "t1"),
        ("stopped", "t2"),
        ("measured", "t2"),
        ("promoted", "t1"),
        ("out", "t2"),
        ("out", "t0"),
        ("finished", "t1"),
        ("winner", "t1"),
    ]
    assert message[0]["dev_loss"] == 0.3
    assert message[0]["seconds"] == LOAD + 20 * STEP


@pytest.mark.parametrize("fault", ["{}", "no json", '{"event": "measured"}'])
def test_changed_ledger_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    trials, rungs = _trials(2), halving_rungs(2, 10)
    World({}).halving(tmp_path, trials, rungs, None).run()
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], fault, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="Not a valid ledger line") as caught:
        World({}).halving(tmp_path, trials, rungs, None)
    assert caught.value.where == f"{path}:2"
    path.write_text(_head(_trials(3), rungs).model_dump_json() + "\n")
    with pytest.raises(UserError, match="not the ledger of this sweep"):
        World({}).halving(tmp_path, trials, rungs, None)


# What is tried


def test_suggested_rate_matches_the_published_fit() -> None:
    """Values of the published formula, rounded: an 8B Llama, a 70B one, and a small one."""
    assert [f"{suggested_rate(width):.1e}" for width in (4096, 8192, 576)] == ["2.9e-04", "1.7e-04", "1.3e-03"]


@given(st.floats(1e-6, 0.5), st.sampled_from([64, 576, 2048, 4096, 8192]))
def test_default_rates_include_the_config_rate(own: float, width: int) -> None:
    rates = default_rates(own, width)
    assert own in rates
    assert len(set(rates)) == len(rates) == 3
    assert list(rates) == sorted(rates)
    assert sum(rate != own for rate in rates) == 2


def test_make_trials_combines_presets_and_rates_with_the_config_first() -> None:
    own = TrainConfig(epochs=2, lora_r=8)
    trials = make_trials(own, [1e-3, 2e-4, 5e-3])
    assert [t.name for t in trials] == [
        "classic-0.0002",
        "all-linear-0.001",
        "all-linear-0.0002",
        "all-linear-0.005",
        "classic-0.001",
        "classic-0.005",
    ]
    assert trials[0].train == own
    assert all(t.train.target_modules == PRESETS[t.train.preset]["target_modules"] for t in trials)
    assert {(t.train.epochs, t.train.lora_r) for t in trials} == {(2, 8)}


@pytest.mark.parametrize("rates", [[0.0], [2.0], [math.nan], [1e-3, 1e-3]])
def test_make_trials_refuses_invalid_rates(rates: list[float]) -> None:
    with pytest.raises(UserError):
        make_trials(TrainConfig(), rates)
