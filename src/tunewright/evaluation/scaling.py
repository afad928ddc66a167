"""Scaling an adapter down: a smaller scale forgets less, and often does as well on the task."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.keys import PrivateKey
from tunewright.adapters.registry import REPLAY, Adapter, store_adapter
from tunewright.adapters.scaling import scale_weights
from tunewright.adapters.signing import store_signer
from tunewright.config import MetricName
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.forgetting import Forgetting, ForgettingMeter
from tunewright.metrics import points_text

FACTORS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Scaled:
    """The adapter times one factor, as measured on dev and on the base's own samples."""

    factor: float
    dev: float
    """The config's metric on the dev split, as a share."""
    forgetting: Forgetting


@dataclass(frozen=True)
class ScaleResult:
    """The result of `scale`."""

    parent: Adapter
    adapter: Adapter
    """The chosen adapter: a new one, or the parent if factor 1 is best."""
    tried: tuple[Scaled, ...]
    chosen: Scaled
    metric: MetricName
    dev_items: int
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "parent": self.parent.name,
            "adapter": self.adapter.name,
            "factor": self.chosen.factor,
            "metric": self.metric,
            "dev_items": self.dev_items,
            "rule": self.rule,
            "tried": _account(self.tried),
        }


def scale(
    arm_runner: ArmRunner, meter: ForgettingMeter, parent: Adapter, factors: Sequence[float] = FACTORS
) -> ScaleResult:
    """Measure an adapter at several scales, and store it at the chosen one.

    The choice is the factor that forgets least, among those within evaluate.margin of the best on dev. Measurements are
    kept in the working folder, so a stopped sweep resumes.

    Args:
        arm_runner, meter: the project's, on the dataset version that the adapter was trained on.
        parent: the adapter.
        factors: multipliers of its change to the base; 1 is always tried.

    Raises:
        UserError: a factor is invalid, or the adapter is itself a scaled one.
    """
    if "scaled" in parent.lineage:
        whole = parent.lineage["scaled"]["parent"]
        raise UserError(
            f"The adapter is already {whole} times {parent.lineage['scaled']['factor']:g}",
            where=parent.name,
            fix=f"Scale that one: tunewright adapters scale {whole}",
        )
    wanted = sorted({*factors, 1.0})
    if not all(0 < factor <= 2 for factor in wanted):
        raise UserError(
            f"A factor must be above 0 and at most 2 (got {min(wanted):g} to {max(wanted):g})", where="--factor"
        )
    margin, metric = arm_runner.settings.margin, arm_runner.scorers[0].name
    project = arm_runner.project
    trial = project.work / "scaled"
    tried: dict[float, Scaled] = {}
    adapters: dict[float, Adapter] = {}
    for factor in wanted:
        adapter = parent if factor == 1 else _scaled(arm_runner, parent, factor, trial)
        adapters[factor] = adapter
        tried[factor] = Scaled(factor, arm_runner.dev_scores(adapter).total(), meter.measure(adapter))
    chosen = choose([*tried.values()], margin)
    rule = f"the least forgetting of those that lose less than {points_text(margin)[1:]} points on dev against the best"
    lineage = {"factor": chosen.factor, "rule": rule, "metric": metric, "tried": _account([*tried.values()])}
    kept = parent if chosen.factor == 1 else _keep(arm_runner, parent, adapters[chosen.factor], lineage)
    shutil.rmtree(trial, ignore_errors=True)
    return ScaleResult(
        parent, kept, tuple(tried.values()), chosen, metric, len(arm_runner.version.examples("dev")), rule
    )


def choose(tried: Sequence[Scaled], margin: float) -> Scaled:
    """Return the one that forgets least, of those that lose less than ``margin`` (or nothing) to the best."""
    best = max(each.dev for each in tried)
    near = [each for each in tried if each.dev == best or best - each.dev < margin]
    return min(near, key=lambda each: (each.forgetting.increase, -each.factor))


def _scaled(arm_runner: ArmRunner, parent: Adapter, factor: float, place: Path) -> Adapter:
    """Return the adapter times a factor, in a folder of trials."""
    weights = place / f".{parent.digest[:12]}-{factor:g}"
    scale_weights(parent.folder, factor, weights)
    identity = digest({"parent": parent.digest, "factor": factor})
    lineage = {**parent.lineage, "created": now(), "inputs_digest": identity}
    return _store(arm_runner, place, weights, lineage, parent)


def _keep(arm_runner: ArmRunner, parent: Adapter, trial: Adapter, how: dict[str, Any]) -> Adapter:
    """Store the chosen trial as a signed adapter of the project, with its origin and the reason."""
    lineage = {**trial.lineage, "scaled": {"parent": parent.name, "parent_digest": parent.digest, **how}}
    signer = store_signer(arm_runner.project.keys, arm_runner.reporter)
    return _store(arm_runner, arm_runner.project.adapters, trial.folder, lineage, parent, signer)


def _store(
    arm_runner: ArmRunner,
    place: Path,
    weights: Path,
    lineage: dict[str, Any],
    parent: Adapter,
    signer: PrivateKey | None = None,
) -> Adapter:
    # The parent's other training data stay recorded for the scaled adapter.
    replayed = parent.folder / REPLAY
    return store_adapter(
        place,
        arm_runner.project.config.name,
        weights,
        {},
        lineage,
        parent.history,
        servable=parent.lineage["config"]["train"]["require_vllm_compatible"] if "config" in parent.lineage else True,
        texts={REPLAY: replayed.read_text(encoding="utf-8")} if replayed.exists() else None,
        signer=signer,
    )


def _account(tried: Sequence[Scaled]) -> list[dict[str, Any]]:
    return [{"factor": e.factor, "dev": e.dev, "forgetting": e.forgetting.as_dict()} for e in tried]
