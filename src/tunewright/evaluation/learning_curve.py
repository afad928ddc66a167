"""Learning curves: an estimate of the gain from more data.

Adapters are trained on a quarter, half and all of the training rows, nested and by whole clusters. Each size is trained
with several seeds, and every adapter answers the same dev rows. The result is the slope per doubling, with its
interval. Dev rather than test: the question comes up while there is still something to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.chat.answers import answer_limit
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import duration
from tunewright.evaluation.arm_runner import measured_with, references_inputs
from tunewright.evaluation.folds import SubsetTrainings, subset_versions
from tunewright.evidence.learning_curve import (
    CURVE_FILE,
    Curve,
    Point,
    Slope,
    corpus_slope,
    share_slope,
)
from tunewright.metrics import Scores, metric_inputs, score_all, scorer_of
from tunewright.training.train import training_inputs
from tunewright.training.trainings import Training

SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class CurveResult:
    """The result of a learning curve."""

    folder: Path
    curve: Curve
    measured: bool
    """False when a curve of the same inputs already existed."""


@dataclass(eq=False)
class LearningCurve(SubsetTrainings):
    """The parts of a version's training rows by some ``seeds``, and everything that decides the result."""

    seeds: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.seeds >= 2
        self.scorer = scorer_of(self.config.evaluate.metric, self.project.root)
        self.parts = {
            (seed, share): part
            for seed in self._seeds
            for share, part in zip(SHARES, subset_versions(self.version, SHARES, seed), strict=True)
        }
        place = f" in a {SHARES[0]:.0%} part of them, as a curve needs"
        self.require_enough(self.parts.values(), place)
        # From all training rows, so that no part truncates answers that another does not.
        self.limit = answer_limit(self.config, self.chat, self.version.domain_of("train"))

    @property
    def _seeds(self) -> tuple[int, ...]:
        return tuple(range(self.config.seed, self.config.seed + self.seeds))

    @property
    def identity(self) -> str:
        """12 hex digits: a digest of everything that decides the curve."""
        settings = self.project.config.evaluate
        trainings = [
            training_inputs(self._config(seed), part, self.base, self.chat) for (seed, _), part in self.parts.items()
        ]
        decides = {
            "trainings": trainings,
            "max_new_tokens": self.limit,
            "metric": metric_inputs(settings.metric, self.project.root),
            "margin": settings.margin,
            **references_inputs(self.version.domain),
            "quantization": self.quantization,
            **self.generator().engine.identity,
        }
        return digest(decides)[:12]

    def run(self) -> CurveResult:
        """Train and answer. A stopped curve resumes and reuses its finished work."""
        file = self.project.curves / self.identity / CURVE_FILE
        if file.exists():
            return CurveResult(file.parent, Curve.model_validate_json(file.read_bytes()), measured=False)
        planned, sizes = [], []
        for (seed, share), part in self.parts.items():
            facts = {"curve": {"of": self.version.digest, "share": share, "seed": seed}}
            name = f"{share:.0%} with seed {seed}"
            training = Training(name, self._config(seed), part, self.project.curve_adapters, facts)
            sizes.append(len(part.domain_of("train")))
            message = f"{share:.0%} of the training rows, seed {seed}: {sizes[-1]:,} rows"
            planned.append((training, share, message))
        points: list[Point] = []
        scores: dict[tuple[int, float], Scores] = {}
        found = self.trained(planned, lambda _, left, count: f"The {count} others: about {duration(left)}.", own=True)
        for (seed, share), rows, trained in zip(self.parts, sizes, found, strict=True):
            scores[seed, share] = self._scores(trained.adapter)
            training = trained.adapter.lineage["training"]
            kept = next(each for each in training["epochs"] if each["step"] == training["kept_step"])
            points.append(
                Point(
                    share=share,
                    seed=seed,
                    rows=rows,
                    score=scores[seed, share].total(),
                    dev_loss=kept["dev_loss"],
                    adapter=trained.adapter.digest,
                )
            )
        curve = self._curve(points, scores)
        write_json(file, curve.model_dump(mode="json"))
        return CurveResult(file.parent, curve, measured=True)

    def _config(self, seed: int) -> ProjectFolder:
        return ProjectFolder(self.project.root, self.project.config.model_copy(update={"seed": seed}))

    def _scores(self, adapter: Adapter) -> Scores:
        """Answer the dev rows and score the answers."""
        generator = self.generator()
        examples = [m.example for m in self.version.examples("dev")]
        answers = generator.answer("answering dev", [generator.prompt(e.prompt) for e in examples], self.limit, adapter)
        return score_all(self.scorer, [g.text for g in answers], examples)

    def _curve(self, points: list[Point], scores: Mapping[tuple[int, float], Scores]) -> Curve:
        config, dev = self.project.config, self.version.examples("dev")
        slope = self._slope(points, scores)
        return Curve(
            id=self.identity,
            project=config.name,
            metric=self.scorer.name,
            margin=config.evaluate.margin,
            items=len(dev),
            clusters=len({m.cluster for m in dev}),
            shares=SHARES,
            seeds=self._seeds,
            points=points,
            slope=slope.per_doubling,
            interval=slope.interval,
            method=slope.method,
            lineage={
                **measured_with(config, self.base, self.chat, self.quantization, self.limit),
                "engine": self.generator().used.model_dump(mode="json"),
                "dataset": self.version.digest,
                "dev_split": self.version.split_digest("dev"),
                "config": config.deciding(),
                "forced": self.forced,
            },
        )

    def _slope(self, points: Sequence[Point], scores: Mapping[tuple[int, float], Scores]) -> Slope:
        """Return the slope over the dev rows that are scored for every adapter."""
        everywhere = np.logical_and.reduce([each.scored for each in scores.values()])
        if not everywhere.any():
            raise UserError(f"No dev item is scored by {self.scorer.name} for every adapter", where="evaluate.metric")
        left_out = int((~everywhere).sum())
        if left_out:
            self.reporter.warn(
                f"{left_out} of {len(everywhere)} dev items cannot be scored by {self.scorer.name} for every adapter; "
                "the slope is measured on the others."
            )
        dev, seed = self.version.examples("dev"), self.project.config.seed
        clusters = [m.cluster for m, here in zip(dev, everywhere, strict=True) if here]
        sizes = np.array([p.rows for p in points]).reshape(self.seeds, len(SHARES))
        by_seed = [[scores[seed, share] for share in SHARES] for seed in self._seeds]
        if self.scorer.kind == "right or wrong":
            right = np.array([[each.values[everywhere] for each in row] for row in by_seed])
            return share_slope(right, sizes, clusters, seed)
        statistics = np.array([[each.statistics[everywhere] for each in row] for row in by_seed])
        return corpus_slope(statistics, self.scorer.corpus, sizes, clusters, seed)
