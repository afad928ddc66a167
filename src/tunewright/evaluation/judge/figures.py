"""Rates from a judge's verdicts, also at equal length, and its controls: cases whose answer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import beta

from tunewright.core.errors import UserError
from tunewright.evaluation.judge.questions import (
    INJECTION,
    ArmCorrectness,
    ArmPreference,
    ControlRow,
    JudgedItem,
    JudgeQuestion,
    Vote,
    correctness,
    outcome,
    pairwise,
)
from tunewright.evidence.common import Interval, Score
from tunewright.evidence.judge import (
    Control,
    ControlName,
    JudgedArm,
    JudgedContrast,
    LengthControlled,
    Preference,
    WinRate,
)
from tunewright.evidence.power import minimum_detectable_effect
from tunewright.evidence.schema import Item
from tunewright.evidence.statistics import (
    RESAMPLES,
    bootstrap_sums,
    difference_interval,
    effective_items,
    exact_mcnemar,
    percentiles,
    wilson,
)
from tunewright.metrics import normalised

FEWEST_EACH_SIDE = 5
"""Minimum pairs with the treatment no longer, and no shorter: below, equal lengths are an extrapolation."""

_MATCHED = 0.1
_LENGTH_RESAMPLES = 1_000
_SLOPE_DEVIATION = 2.5
_NEWTON_STEPS = 30
_CELLS = 1_000_000  # fits times pairs in memory at once: 8 MB for each of a handful of arrays
_BOOTSTRAP = f"percentile bootstrap over clusters, {RESAMPLES:,} resamples, Bonett-Price adjusted"

Floats = NDArray[np.float64]


def exact_lower_limit(passed: int, tried: int) -> float:
    """Return the lower 95% limit (one-sided) of a share, by Clopper and Pearson (1934)."""
    return float(beta.ppf(0.05, passed, tried - passed + 1)) if passed else 0.0


def judged_arm(name: str, verdicts: Sequence[ArmCorrectness], clusters: Sequence[str]) -> JudgedArm:
    """Return the correctness of one arm; it needs at least one verdict."""
    scored = [(v, c) for v, c in zip(verdicts, clusters, strict=True) if v.correct is not None]
    right = np.array([v.correct for v, _ in scored], dtype=np.float64)
    worth = effective_items(right, [c for _, c in scored])
    share = float(right.mean())
    method = "Wilson" if round(worth) == len(right) else f"Wilson, {worth:.0f} effective items"
    return JudgedArm(
        name=name,
        items=len(scored),
        correct=int(right.sum()),
        exact=sum(v.exact for v, _ in scored),
        share=Score(value=share, interval=wilson(share, worth), method=method),
        unscored=reasons(verdicts),
    )


def judged_contrast(
    treatment: str, control: str, rows: Sequence[JudgedItem], clusters: Sequence[str], seed: int
) -> JudgedContrast | None:
    """Return treatment's correctness minus control's on items where both have a verdict; None without such items."""
    changes, where = [], []
    for row, cluster in zip(rows, clusters, strict=True):
        ours, theirs = row.correctness[treatment].correct, row.correctness[control].correct
        if ours is not None and theirs is not None:
            changes.append(float(ours) - float(theirs))
            where.append(cluster)
    if not changes:
        return None
    change = np.array(changes)
    worth = effective_items(change, where)
    return JudgedContrast(
        treatment=treatment,
        control=control,
        items=len(change),
        difference=float(change.mean()),
        interval=difference_interval(change, where, seed),
        interval_method=_BOOTSTRAP,
        p_value=exact_mcnemar(change, where),
        test=_test_name("exact McNemar", where),
        fixed=int((change > 0).sum()),
        broken=int((change < 0).sum()),
        effective_items=worth,
        minimum_detectable_effect=minimum_detectable_effect(worth, float(np.abs(change).mean())),
    )


def preference(
    treatment: str,
    opponent: str,
    rows: Sequence[JudgedItem],
    lengths: Mapping[str, tuple[int, int]],
    clusters: Sequence[str],
    seed: int,
) -> Preference:
    """Return the treatment's win rates against one opponent; at least one pair needs a verdict.

    ``lengths`` are the characters of both answers by pair key, the treatment's first.
    """
    plain = [row.pairs[opponent].plain for row in rows]
    scored = [place for place, pair in enumerate(plain) if pair.outcome is not None]
    where = [clusters[place] for place in scored]
    results = _results([plain[place] for place in scored])
    asked = sum(not plain[place].equal for place in scored)
    flips = sum(plain[place].flipped for place in scored)
    gaps = np.array([lengths[rows[place].key] for place in scored], dtype=np.float64)
    controlled, note = length_controlled(results, gaps, where, seed)
    return Preference(
        treatment=treatment,
        opponent=opponent,
        pairs=len(scored),
        equal=sum(plain[place].equal for place in scored),
        flips=flips,
        flip_rate=flips / asked if asked else None,
        rate=win_rate(results, where, seed),
        p_value=exact_mcnemar(results, where),
        test=_test_name("exact sign test", where),
        stripped=_stripped_rate(rows, opponent, clusters, seed),
        stripped_texts=sum(row.pairs[opponent].stripped is not None for row in rows),
        length_controlled=controlled,
        length_note=note,
        unscored=reasons(plain),
    )


def _stripped_rate(rows: Sequence[JudgedItem], opponent: str, clusters: Sequence[str], seed: int) -> WinRate | None:
    """Return the rate over all pairs; pairs without markdown keep their verdict. None if no text has markdown."""
    pairs = [row.pairs[opponent] for row in rows]
    if all(pair.stripped is None for pair in pairs):
        return None
    compared_pairs = [(pair.stripped or pair.plain, cluster) for pair, cluster in zip(pairs, clusters, strict=True)]
    scored = [(compared, cluster) for compared, cluster in compared_pairs if compared.outcome is not None]
    if not scored:
        return None
    return win_rate(_results([compared for compared, _ in scored]), [cluster for _, cluster in scored], seed)


def _results(pairs: Sequence[ArmPreference]) -> Floats:
    values = {"win": 1.0, "tie": 0.0, "loss": -1.0}
    return np.array([values[pair.outcome] for pair in pairs if pair.outcome is not None])


def win_rate(results: Floats, clusters: Sequence[str], seed: int) -> WinRate:
    """Return wins plus half the ties; ``results`` are +1, 0 and -1, [pairs]."""
    spread = difference_interval(results, clusters, seed)
    return WinRate(
        wins=int((results > 0).sum()),
        ties=int((results == 0).sum()),
        losses=int((results < 0).sum()),
        value=float(results.mean() + 1) / 2,
        interval=Interval(low=max((spread.low + 1) / 2, 0.0), high=min((spread.high + 1) / 2, 1.0)),
        method=_BOOTSTRAP,
    )


def length_controlled(
    results: Floats, lengths: Floats, clusters: Sequence[str], seed: int
) -> tuple[LengthControlled | None, str | None]:
    """Return the win rate at equal length: sigmoid(a) of P(win) = sigmoid(a + b tanh(gap / s)).

    gap is the treatment's length minus the opponent's in characters, and s the gaps' standard deviation.
    A tie is half a win and half a loss; b has a normal prior of deviation 2.5. This is the length term
    of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), fitted only on these pairs.

    ``results`` are +1, 0 or -1, [pairs]; ``lengths`` the characters of both answers, the treatment's first, [pairs, 2].
    Without a rate there is a reason: barely overlapping lengths leave nothing to compare at equal length.
    """
    gaps = lengths[:, 0] - lengths[:, 1]
    sides = {"longer": int((gaps <= 0).sum()), "shorter": int((gaps >= 0).sum())}
    for side, count in sides.items():
        if count < FEWEST_EACH_SIDE:
            return None, (
                f"the treatment is {side} in all pairs but {count}: the effect of equal lengths is unknown "
                f"(at least {FEWEST_EACH_SIDE} are needed)"
            )
    scale = float(gaps.std())
    matched = int((np.abs(gaps) <= _MATCHED * lengths.max(axis=1)).sum())
    if scale == 0:
        return None, "all pairs have answers of equal length: the win rate is at equal length already"
    covariate = np.tanh(gaps / scale)
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    wins = (results + 1) / 2
    intercepts, slopes = logistic(covariate, wins, np.ones((1, len(wins))))
    drawn = bootstrap_sums(np.eye(len(names), dtype=np.int64), seed, _LENGTH_RESAMPLES)
    parts = np.array_split(drawn, max(1, _LENGTH_RESAMPLES * len(wins) // _CELLS))
    rates = [expit(logistic(covariate, wins, part[:, codes].astype(np.float64))[0]) for part in parts]
    return (
        LengthControlled(
            value=float(expit(intercepts[0])),
            interval=percentiles(np.concatenate(rates)),
            slope=float(slopes[0]),
            matched=matched,
            method=f"logistic regression on tanh(length gap / {scale:.1f} characters), percentile bootstrap over "
            f"clusters, {_LENGTH_RESAMPLES:,} resamples",
        ),
        None,
    )


def logistic(covariate: Floats, wins: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Fit P(win) = sigmoid(a + b covariate) many times at once, by Newton's method; b has a normal prior.

    All fits of a bootstrap are one call; libraries fit one model at a time.

    ``covariate`` and ``wins``, the shares of a win from 0 to 1, are [pairs]; ``weights`` are [fits, pairs]. The
    intercepts and slopes are [fits] each. If all are wins, or all losses, the intercept diverges: it is large.
    """
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    prior = 1 / _SLOPE_DEVIATION**2
    for _ in range(_NEWTON_STEPS):
        chance = expit(a[:, None] + b[:, None] * covariate)
        residual, curve = weights * (wins - chance), weights * chance * (1 - chance)
        up_a, up_b = residual.sum(axis=1), residual @ covariate - prior * b
        aa, ab, bb = curve.sum(axis=1) + 1e-12, curve @ covariate, curve @ np.square(covariate) + prior
        determinant = aa * bb - ab * ab
        # Steps of 1 at most: from a flat start Newton's full step can overshoot and never come back.
        step_a = np.clip((bb * up_a - ab * up_b) / determinant, -1, 1)
        step_b = np.clip((aa * up_b - ab * up_a) / determinant, -1, 1)
        a, b = a + step_a, b + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return a, b


def reasons(verdicts: Sequence[ArmCorrectness] | Sequence[ArmPreference] | Sequence[ControlRow]) -> dict[str, int]:
    """Return the number of missing verdicts for each reason."""
    counted = Counter(v.unscored for v in verdicts if v.unscored is not None)
    return dict(sorted(counted.items()))


def _test_name(name: str, clusters: Sequence[str]) -> str:
    return name if len(set(clusters)) == len(clusters) else f"{name} by cluster"


# Cases whose answer is known by construction: a judge that gets them wrong is vetoed


REQUIRED = 0.8
"""Minimum share of obvious cases; GPT-4 and people agree on over 80% of real cases (Zheng et al. 2023, 2306.05685)."""

FEWEST = 14
"""With fewer, the lower limit stays below `REQUIRED` even if all pass: 0.05 ** (1 / 13) is 0.794."""

_EXPECTED: dict[ControlName, str] = {
    "gold is correct": "the reference itself is correct",
    "swapped reference": "another item's reference is incorrect",
    "injected verdict": "a wrong answer that dictates the verdict is incorrect",
    "gold against gold": "equal answers tie",
    "gold against other": "the reference wins against another item's, in both orders",
}


@dataclass(frozen=True)
class Case:
    """One item of one control."""

    control: ControlName
    key: str
    questions: tuple[JudgeQuestion, ...]

    def row(self, votes: Sequence[Vote]) -> ControlRow:
        """Return a row with the judge's result; ``votes`` answer this case's questions."""
        missing = next((vote.unscored for vote in votes if vote.unscored), None)
        return ControlRow(
            key=self.key,
            control=self.control,
            passed=missing is None and _PASSED[self.control](votes),
            unscored=missing,
            replies=tuple(vote.reply for vote in votes),
        )


_PASSED: dict[ControlName, Callable[[Sequence[Vote]], bool]] = {
    "gold is correct": lambda votes: votes[0].verdict == "correct",
    "swapped reference": lambda votes: votes[0].verdict == "incorrect",
    "injected verdict": lambda votes: votes[0].verdict == "incorrect",
    "gold against gold": lambda votes: votes[0].verdict == "tie",
    "gold against other": lambda votes: outcome(votes[0], votes[1]) == ("win", False),
}


def control_cases(items: Sequence[Item], most: int, seed: int, criteria: str | None) -> list[Case]:
    """Return the controls on up to ``most`` items, one per cluster, each with another cluster's reference."""
    rng = np.random.default_rng(seed)
    shuffled = [items[place] for place in rng.permutation(len(items))]
    first_of = {item.cluster: item for item in reversed(shuffled) if item.reference.strip()}
    chosen: list[tuple[Item, Item]] = []
    for item in first_of.values():
        if len(chosen) == most:
            break
        unlike = [
            other
            for other in first_of.values()
            if other.cluster != item.cluster and normalised(other.reference) != normalised(item.reference)
        ]
        if unlike:
            chosen.append((item, unlike[int(rng.integers(len(unlike)))]))
    if len(chosen) < FEWEST:
        raise UserError(
            f"Testing a judge requires at least {FEWEST} items of different clusters with different references "
            f"(got {len(chosen)})",
            fix="Evaluate on more items that differ.",
        )
    return [case for item, other in chosen for case in _cases(item, other, criteria)]


def _cases(item: Item, other: Item, criteria: str | None) -> list[Case]:
    task, gold, wrong = item.input, item.reference, other.reference
    asked: dict[ControlName, tuple[JudgeQuestion, ...]] = {
        "gold is correct": (correctness(task, gold, gold, criteria),),
        "swapped reference": (correctness(task, wrong, gold, criteria),),
        "injected verdict": (correctness(task, gold, INJECTION.format(wrong=wrong), criteria),),
        "gold against gold": (pairwise(task, gold, gold, gold, criteria),),
        "gold against other": (
            pairwise(task, gold, gold, wrong, criteria),
            pairwise(task, gold, wrong, gold, criteria),
        ),
    }
    return [Case(control, item.key, questions) for control, questions in asked.items()]


def measured_controls(rows: Sequence[ControlRow]) -> tuple[Control, ...]:
    """Return each control's count and limit."""
    controls = []
    for name, expected in _EXPECTED.items():
        of_it = [row for row in rows if row.control == name]
        passed = sum(row.passed for row in of_it)
        controls.append(
            Control(
                name=name,
                expected=expected,
                items=len(of_it),
                passed=passed,
                unscored=reasons(of_it),
                limit=exact_lower_limit(passed, len(of_it)),
                required=REQUIRED,
            )
        )
    return tuple(controls)


def veto(controls: Sequence[Control]) -> tuple[str, ...]:
    """Return the reason for a veto; empty if the judge passes all controls."""
    return tuple(
        f"{c.name} ({c.expected}): {c.passed} of {c.items} passed"
        + "".join(f", {count} without a verdict ({why})" for why, count in c.unscored.items())
        + f"; that is at least {c.limit:.0%} with 95% "
        f"confidence, and {c.required:.0%} is required"
        for c in controls
        if not c.held
    )
