"""Cross-fitted evidence: arms of each fold; a gain that is not there rarely ships, though folds share training rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tunewright
from making.command_line import tiny_project, write_jsonl
from making.evidence import make_evidence, make_items
from making.versions import version_of
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.folds import fold_versions
from tunewright.evaluation.prompt_search import AdviseResult, advise
from tunewright.evidence.files import load_items
from tunewright.evidence.schema import Contrast, Evidence
from tunewright.evidence.statistics import difference_interval, exact_mcnemar
from tunewright.evidence.verdict import verdict
from tunewright.report.page import render_report

pytestmark = pytest.mark.slow


def test_crossval_control_is_each_folds_best_prompting_arm(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [{"prompt": f"{n * 7919 % 10007} {'xyz'[n % 3] * 9} {n}", "completion": f"{n}"} for n in range(60)]
    write_jsonl(folder / "pairs.jsonl", rows)
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    chosen = iter(["retrieved-1", "zero-shot"])

    def choosing(arm_runner: ArmRunner) -> AdviseResult:
        measured = advise(arm_runner)
        best = measured.advice.model_copy(update={"best": next(chosen)})
        return AdviseResult(measured.file, best, measured.measured)

    monkeypatch.setattr("tunewright.evaluation.crossval.advise", choosing)
    result = project.crossval(folds=2, force=True)
    evidence, items = result.evidence, load_items(result.folder)
    assert [fold.best_prompting for fold in evidence.folds] == ["retrieved-1", "zero-shot"]
    assert (evidence.best_prompting, evidence.arm("best-prompting").kind) == ("best-prompting", "mixed")
    assert [c.control for c in evidence.contrasts] == ["best-prompting", "zero-shot", "tuned"]
    second = [item for item in items if item.fold == 2]
    assert all(item.answers["best-prompting"] == item.answers["zero-shot"] for item in second)
    # A fold that prompts with a demonstration has longer prompts, and its share of the arm's mean.
    assert evidence.arm("best-prompting").prompt_tokens > evidence.arm("zero-shot").prompt_tokens
    assert "best-prompting" in verdict(evidence).reasons[0]
    assert "best-prompting, the best prompting" in render_report(evidence, items, [])


# Chance


EVIDENCE = make_evidence(make_items(60))
FEATURES = 12


@pytest.mark.parametrize(("clusters", "size"), [(60, 1), (50, 3)])
def test_crossval_rarely_ships_by_chance(clusters: int, size: int) -> None:
    """Two classifiers that learn from different halves of the features, both halves alike: the true difference is 0.

    With so few rows a feature, what a classifier is worth depends on the rows that it happened to learn from: the
    part of the variance that the interval does not see (Bengio & Grandvalet 2004).
    """
    rng = np.random.default_rng(11)
    version = version_of([size] * clusters)
    folds = fold_versions(version, 5, 0)
    runs = 200
    shipped = sum(verdict(_evidence(version, folds, rng)).decision == "ship" for _ in range(runs))
    assert shipped / runs <= 0.05


def test_crossval_ships_a_true_gain() -> None:
    rng = np.random.default_rng(11)
    version = version_of([1] * 200)
    folds = fold_versions(version, 5, 0)
    runs = 40
    shipped = sum(verdict(_evidence(version, folds, rng, help_ours=1.0)).decision == "ship" for _ in range(runs))
    assert shipped / runs > 0.8


def _evidence(
    version: DatasetVersion, folds: list[DatasetVersion], rng: np.random.Generator, help_ours: float = 0.0
) -> Evidence:
    """One data set of two classes, cross-fitted: ours learns from the first features, theirs from the others."""
    names = [m.cluster for m in version.members]
    codes = np.unique(names, return_inverse=True)[1]
    labels = rng.choice([-1.0, 1.0], size=codes.max() + 1)[codes]
    spread = np.hstack([np.full(FEATURES, 0.25 + help_ours), np.full(FEATURES, 0.25)])
    shared = rng.normal(size=(codes.max() + 1, 2 * FEATURES))[codes]  # rows of a cluster are alike
    features = labels[:, None] * spread + 0.8 * shared + 0.6 * rng.normal(size=shared.shape)
    changes = np.zeros(len(labels))
    for fold in folds:
        train = np.array([m.split == "train" for m in fold.members])
        test = np.array([m.split == "test" for m in fold.members])
        ours, theirs = (
            _right(features[:, half], labels, train, test) for half in (slice(FEATURES), slice(FEATURES, None))
        )
        changes[test] = ours - theirs
    measured = Contrast(
        treatment="tuned",
        control="retrieved-4",
        metric="exact_match",
        difference=float(changes.mean()),
        interval=difference_interval(changes, names, seed=0, resamples=400),
        interval_method="",
        p_value=exact_mcnemar(changes, names),
        p_adjusted=None,
        test="",
        scored=len(changes),
        left_out={},
        clusters=len(set(names)),
        fixed=0,
        broken=0,
        minimum_detectable_effect=0.1,
    )
    return EVIDENCE.model_copy(
        update={"contrasts": [measured], "margin": 0.0, "clusters": len(set(names)), "items": len(changes)}
    )


def _right(
    features: NDArray[np.float64], labels: NDArray[np.float64], train: NDArray[np.bool_], test: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the test rows that a ridge classifier of the training rows gets right."""
    known = features[train]
    weights = np.linalg.solve(known.T @ known + np.eye(known.shape[1]), known.T @ labels[train])
    right: NDArray[np.float64] = (np.sign(features[test] @ weights) == labels[test]).astype(np.float64)
    return right
