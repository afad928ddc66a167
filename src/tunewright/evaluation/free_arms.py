"""Free arms: answers without a language model, fitted on the training rows only.

The most frequent answer, the nearest training row's, and two linear models. On labels they are often as good as an
adapter. The best one on dev is compared with the adapter by non-inferiority; the others are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
_BLOCK = 256
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
    if len(different) <= MOST_LABELS and 2 * len(different) <= len(trained):
        return f"the training rows have {len(different):,} different answers", True
    seen = sum(answer in different for answer in held_out)
    if held_out and seen >= SEEN * len(held_out):
        return f"{seen:,} of {len(held_out):,} dev answers are seen in training", True
    short = sum(len(answer) <= SHORT and "\n" not in answer for answer in trained)
    if trained and short >= SEEN * len(trained):
        return f"{short:,} of {len(trained):,} training answers have at most {SHORT} characters", False
    return None


class _Fitted:
    """Free arms on the training rows of a version; each answers rows, and none sees their answers."""

    def __init__(self, arm_runner: ArmRunner) -> None:
        self._runner = arm_runner
        self._train = arm_runner.version.domain_of("train")
        self._answers = [m.example.output.strip() for m in self._train]
        self._seed = arm_runner.project.config.seed

    @cached_property
    def _index(self) -> TfIdf:
        return TfIdf([m.example.input_text for m in self._train])

    def left_out(self, *, labels: bool) -> dict[str, str]:
        """Return the arms that cannot answer, with the reason."""
        if not labels:
            return dict.fromkeys((MAJORITY, TFIDF, HIDDEN), "it needs answers that repeat")
        classes, generator = len(set(self._answers)), self._runner.generator
        if not 2 <= classes <= MOST_CLASSES:
            why = f"a linear model takes 2 to {MOST_CLASSES} different answers, and there are {classes:,}"
            return dict.fromkeys((TFIDF, HIDDEN), why)
        if generator.workers is not None:
            return {HIDDEN: "the machines of compute.cluster have the base, and return no hidden states"}
        return {} if generator.engine.environment is None else {HIDDEN: "vLLM returns no hidden states"}

    def answers(self, name: str, rows: Sequence[Member]) -> list[ArmAnswer]:
        """Return an arm's answers to rows."""
        arms: dict[str, Callable[[Sequence[Member]], Sequence[str]]] = {
            MAJORITY: lambda rows: [Counter(self._answers).most_common(1)[0][0]] * len(rows),
            NEAREST: self._nearest,
            TFIDF: self._tfidf,
            HIDDEN: self._hidden,
        }
        with self._runner.reporter.task(name, 1, "arms") as task:
            texts = arms[name](rows)
            task.advance()
        return [ArmAnswer(str(text), False, (), 0) for text in texts]

    def _nearest(self, rows: Sequence[Member]) -> list[str]:
        clusters = np.array([m.cluster for m in self._train])
        found: list[str] = []
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            asked = self._index.vectorizer.transform([m.example.input_text for m in block])
            similar = (asked @ self._index.rows.T).toarray()
            similar[np.array([m.cluster for m in block])[:, None] == clusters] = -1  # as for demonstrations
            found += [self._answers[place] for place in similar.argmax(axis=1).tolist()]
        return found

    def _tfidf(self, rows: Sequence[Member]) -> Any:
        from sklearn.linear_model import SGDClassifier

        places = self._drawn(TFIDF)
        model = SGDClassifier(loss="log_loss", alpha=_REGULARISATION, random_state=self._seed)
        model.fit(self._index.rows[places], [self._answers[place] for place in places])
        return model.predict(self._index.vectorizer.transform([m.example.input_text for m in rows]))

    def _hidden(self, rows: Sequence[Member]) -> Any:
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        places = self._drawn(HIDDEN)
        trained, asked = (
            self._runner.embeddings.of("dense", [m.example.input_text for m in members])
            for members in ([self._train[place] for place in places], rows)
        )
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 6)))
        return model.fit(trained, [self._answers[place] for place in places]).predict(asked)

    def _drawn(self, name: str) -> list[int]:
        """Return the places of the training rows that a linear model is fitted on, with at least two answers."""
        count, most = len(self._train), _MOST_ROWS[name]
        if count <= most:
            return list(range(count))
        self._runner.warn_once(f"{name} is fitted on {most:,} of {count:,} training rows, drawn by the seed.")
        places = sorted(np.random.default_rng(self._seed).choice(count, most, replace=False).tolist())
        if len({self._answers[place] for place in places}) < 2:
            places.append(next(p for p in range(count) if self._answers[p] != self._answers[places[0]]))
        return places


def free_answers(arm_runner: ArmRunner, names: Sequence[str], rows: Sequence[Member]) -> dict[str, list[ArmAnswer]]:
    """Return the answers of these free arms to rows."""
    fitted = _Fitted(arm_runner)
    return {name: fitted.answers(name, rows) for name in names}


def report_free(arm_runner: ArmRunner, scored: ScoredArms, split: str, why: str) -> None:
    """Report the free arms' scores by the deciding metric."""
    metric, arms = next(iter(scored.by_metric.items()))
    scores = ", ".join(f"{name} {score_text(metric, scores.total())}" for name, scores in arms.items())
    arm_runner.reporter.say(f"Without a model, on {split}: {scores} ({why}).")


def free_on_dev(arm_runner: ArmRunner) -> tuple[FreeArms, ScoredArms] | None:
    """Measure the free arms that fit the answers on dev, and choose the best; None if none fits.

    A fold of a cross-validation has none.
    """
    dev, train = arm_runner.version.examples("dev"), arm_runner.version.domain_of("train")
    found = why_free([m.example.output.strip() for m in train], [m.example.output.strip() for m in dev])
    if found is None or arm_runner.folder != arm_runner.project.evaluations:
        return None
    why, labels = found
    left_out = _Fitted(arm_runner).left_out(labels=labels)
    names = [name for name in (MAJORITY, NEAREST, TFIDF, HIDDEN) if name not in left_out]
    scored = scored_arms(arm_runner.scorers, dev, free_answers(arm_runner, names, dev))
    report_free(arm_runner, scored, "dev", why)
    arms = free_measured(scored, names, arm_runner.project.config.seed)
    metric = arm_runner.scorers[0].name
    best = max(arms, key=lambda arm: arm.score(metric).value)  # of equal ones the first, which is the simplest
    missing = tuple(LeftOut(name=name, why=why) for name, why in left_out.items())
    return FreeArms(why=why, dev=arms, best=best.name, left_out=missing), scored


def with_drops(free: FreeArms, scored: ScoredArms, config: Config, **controls: str) -> FreeArms:
    """Return the section with the losses of its best arm against other arms, given as field and arm."""
    arms, margin, seed = next(iter(scored.by_metric.values())), config.evaluate.margin, config.seed
    drops = {
        field: measured_drop(arms[free.best], arms[name], scored.clusters, margin, seed)
        for field, name in controls.items()
    }
    return free.model_copy(update=drops)


def free_measured(scored: ScoredArms, names: Sequence[str], seed: int) -> list[Arm]:
    """Return the free arms' entries for advice and evidence."""
    return [
        score_arm(
            name=name,
            kind="free",
            shots=0,
            scores=scored.of_arm(name),
            clusters=scored.clusters,
            truncated=0,
            prompt_tokens=0,
            seed=seed,
        )
        for name in names
    ]
