"""Free arms: answers without a language model, fitted on the training rows only.

The most frequent answer, the nearest training row's, and two linear models. On labels they are often as good as an
adapter. The best one on dev is compared with the adapter by non-inferiority; the others are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tunewright.config import Config
from tunewright.data.examples import MOST_CLASSES
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner, scored_arms
from tunewright.evaluation.demonstrations import TfIdf
from tunewright.evaluation.generations import ArmAnswer
from tunewright.evidence.incumbents import measured_drop
from tunewright.evidence.schema import Arm, FreeArms, LeftOut
from tunewright.evidence.scoring import ScoredArms, score_arm
from tunewright.metrics import score_text

MOST_LABELS = 50
SEEN = 0.95
"""Share of held-out answers seen in training from which answers count as labels, or of short answers."""
SHORT = 80
"""Characters of a short answer. It may be right as a whole for another input; a longer one is written for its own."""

MAJORITY, NEAREST, TFIDF, HIDDEN = "free-majority", "free-nearest", "free-tfidf", "free-hidden"
_CELLS = 5_000_000
"""Similarities in memory at once."""
_MOST_ROWS = {TFIDF: 20_000, HIDDEN: 2_000}
"""Training rows of a linear model, drawn by the seed if there are more: it is fitted in seconds."""
_REGULARISATION = 1e-5  # that of `data suspects`


def why_free(trained: Sequence[str], held_out: Sequence[str]) -> tuple[str, bool] | None:
    """Return why free arms can answer, and whether answers are labels; None if they cannot.

    Labels repeat: at most 50 different ones, each twice on average, or 95% of ``held_out`` (dev's, so that the test
    split stays closed) are seen in training. A majority and a linear model need repeated answers. Of short answers that
    do not repeat, only the nearest row's can be right.
    """
    different = set(trained)
    if not trained:
        return None
    if len(different) <= MOST_LABELS and 2 * len(different) <= len(trained):
        return f"the training rows have {len(different):,} different answers", True
    seen = sum(answer in different for answer in held_out)
    if held_out and seen >= SEEN * len(held_out):
        return f"{seen:,} of {len(held_out):,} dev answers are seen in training", True
    short = sum(len(answer) <= SHORT and "\n" not in answer for answer in trained)
    if short >= SEEN * len(trained):
        return f"{short:,} of {len(trained):,} training answers have at most {SHORT} characters", False
    return None


class FittedArms:
    """Free arms on the training rows of a version; each answers rows, and none sees their answers."""

    def __init__(self, arm_runner: ArmRunner) -> None:
        self._runner = arm_runner
        self._train = arm_runner.version.domain_of("train")
        self.trained = [m.example.output.strip() for m in self._train]
        self.seed = arm_runner.project.config.seed

    @cached_property
    def _index(self) -> TfIdf:
        return TfIdf(_inputs(self._train))

    def left_out(self, *, labels: bool, timed: bool) -> dict[str, str]:
        """Return the arms that cannot answer, or not in seconds where the time is limited, with the reason."""
        if not labels:
            return dict.fromkeys((MAJORITY, TFIDF, HIDDEN), "it needs answers that repeat")
        classes, generator = len(set(self.trained)), self._runner.generator
        if not 2 <= classes <= MOST_CLASSES:
            why = f"a linear model takes 2 to {MOST_CLASSES} different answers, and there are {classes:,}"
            return dict.fromkeys((TFIDF, HIDDEN), why)
        if generator.engine.environment is not None:
            return {HIDDEN: "vLLM answers, and returns no hidden states"}
        return {HIDDEN: "--minutes leaves it out, because the base reads every input"} if timed else {}

    def answers(self, name: str, rows: Sequence[Member]) -> list[str]:
        """Return an arm's answers to rows."""
        if name == MAJORITY:
            return [Counter(self.trained).most_common(1)[0][0]] * len(rows)
        return self._nearest(rows) if name == NEAREST else self._linear(name, rows)

    def _nearest(self, rows: Sequence[Member]) -> list[str]:
        clusters = np.array([m.cluster for m in self._train])
        found: list[str] = []
        step = max(1, _CELLS // len(self._train))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            similar = (self._index.vectorizer.transform(_inputs(block)) @ self._index.rows.T).toarray()
            similar[np.array([m.cluster for m in block])[:, None] == clusters] = -1  # as for demonstrations
            found += [self.trained[place] for place in similar.argmax(axis=1).tolist()]
        return found

    def _linear(self, name: str, rows: Sequence[Member]) -> list[str]:
        from sklearn.linear_model import RidgeClassifierCV, SGDClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        places, most = list(range(len(self._train))), _MOST_ROWS[name]
        if len(places) > most:
            self._runner.warn_once(f"{name} is fitted on {most:,} of {len(places):,} training rows, drawn by the seed.")
            drawn = np.random.default_rng(self.seed).choice(len(places), most, replace=False)
            # and one row of each class
            places = sorted({*drawn.tolist(), *np.unique(self.trained, return_index=True)[1].tolist()})
        if name == TFIDF:
            model: Any = SGDClassifier(loss="log_loss", alpha=_REGULARISATION, random_state=self.seed)
            known, asked = self._index.rows[places], self._index.vectorizer.transform(_inputs(rows))
        else:
            model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 6)))
            groups = [self._train[place] for place in places], rows
            known, asked = (self._runner.embeddings.of("dense", _inputs(members)) for members in groups)
        answers: list[str] = model.fit(known, [self.trained[place] for place in places]).predict(asked).tolist()
        return answers


def _inputs(members: Sequence[Member]) -> list[str]:
    return [m.example.input_text for m in members]


def answer_free(
    arm_runner: ArmRunner, names: Sequence[str], rows: Sequence[Member], split: str
) -> tuple[dict[str, list[ArmAnswer]], ScoredArms, list[Arm]]:
    """Return the answers of these free arms to rows of a split, their scores, which are reported, and their entries."""
    fitted, found = FittedArms(arm_runner), dict[str, list[ArmAnswer]]()
    with arm_runner.reporter.task(f"answers without a model on {split}", len(names), "arms") as task:
        for name in names:
            found[name] = [ArmAnswer(text, False, (), 0) for text in fitted.answers(name, rows)]
            task.advance()
    scored = scored_arms(arm_runner.scorers, rows, found)
    if names:
        metric, by_arm = next(iter(scored.by_metric.items()))
        scores = ", ".join(f"{name} {score_text(metric, scores.total())}" for name, scores in by_arm.items())
        arm_runner.reporter.say(f"Without a model, on {split}: {scores}.")
    facts: dict[str, Any] = {"kind": "free", "shots": 0, "truncated": 0, "prompt_tokens": 0, "seed": fitted.seed}
    arms = [score_arm(name=name, scores=scored.of_arm(name), clusters=scored.clusters, **facts) for name in names]
    return found, scored, arms


def free_on_dev(arm_runner: ArmRunner, *, timed: bool = False) -> tuple[FreeArms | None, ScoredArms]:
    """Measure the free arms that fit the answers on dev, and choose the best; None if none fits.

    A fold of a cross-validation has none.
    """
    fitted, dev, metric = FittedArms(arm_runner), arm_runner.version.examples("dev"), arm_runner.scorers[0].name
    found = why_free(fitted.trained, [m.example.output.strip() for m in dev])
    if found is None or arm_runner.folder != arm_runner.project.evaluations:
        return None, scored_arms(arm_runner.scorers, dev, {})
    left_out = fitted.left_out(labels=found[1], timed=timed)
    names = [name for name in (MAJORITY, NEAREST, TFIDF, HIDDEN) if name not in left_out]
    _, scored, arms = answer_free(arm_runner, names, dev, "dev")
    best = max(arms, key=lambda arm: arm.score(metric).value)  # of equal ones the first, which is the simplest
    missing = tuple(LeftOut(name=name, why=why) for name, why in left_out.items())
    return FreeArms(why=found[0], dev=arms, best=best.name, left_out=missing), scored


def with_drops(free: FreeArms | None, scored: ScoredArms, config: Config, **controls: str) -> FreeArms | None:
    """Return the section with the losses of its best arm against other arms, by field; None if it is unscored."""
    arms, clusters = next(iter(scored.by_metric.values())), scored.clusters
    if free is None or free.best not in arms:
        return None
    drops = {
        field: measured_drop(arms[free.best], arms[name], clusters, config.evaluate.margin, config.seed)
        for field, name in controls.items()
    }
    return free.model_copy(update=drops)
