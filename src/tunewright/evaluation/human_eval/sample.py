"""The sample of test items for human review, and the side of each answer.

Items are drawn at random within strata of the deciding metric. Each item's chance is therefore known, and results can
be weighted back to all items. The seed is a digest of the evaluation: nobody chooses it, and anybody can check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import quote

import numpy as np
from pydantic import Field

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.log import parse_line
from tunewright.evidence.common import Part
from tunewright.evidence.schema import Evidence, Item
from tunewright.metrics import normalised

FOLDER = "human-eval"
"""Folder next to the evidence."""
SAMPLE_FILE = "sample.json"
ITEMS = 50
"""Default number of items. 33 of 50 that all show a preference are significant at 5%."""
SMALLEST = 5
"""Minimum items of each stratum, if it has them and the sample is large enough, to show broken items as well."""

StratumName = Literal["fixed", "broken", "both right", "both wrong"]
STRATA: tuple[StratumName, ...] = get_args(StratumName)


class StratumSize(Part):
    """The number of drawn items of a stratum, and of its items with different answers."""

    name: StratumName
    items: int
    asked: int


class ReviewSample(Part):
    """The items to review, in order; it does not reveal the sides."""

    evaluation: Annotated[str, Field(description="The evidence's ID.")]
    treatment: str
    control: str
    metric: str
    seed: int
    items: Annotated[int, Field(description="All test items.")]
    same: Annotated[int, Field(description="Items with equal answers, which are ties.")]
    strata: tuple[StratumSize, ...]
    order: Annotated[tuple[str, ...], Field(description="Pair keys.")]


@dataclass(frozen=True)
class Comparison:
    """The two arms that reviewers compare, and the folder of their sample and journals."""

    treatment: str
    control: str
    folder: Path

    def items(self, every: Sequence[Item]) -> list[Item]:
        """Return the items that both arms have answered: an incumbent's endpoint may have failed on some."""
        return [item for item in every if self.treatment in item.answers and self.control in item.answers]


def comparison(folder: Path, evidence: Evidence, against: str | None = None) -> Comparison:
    """Return the comparison of the deciding contrast, or of its treatment with an incumbent."""
    first = evidence.contrasts[0]
    if against is None:
        return Comparison(first.treatment, first.control, folder / FOLDER)
    known = {each.name: each.arm for each in evidence.incumbents.compared} if evidence.incumbents else {}
    if against not in known:
        raise UserError(
            f"Evaluation {evidence.id} has no incumbent {against!r}",
            where="--against",
            fix=f"Use one of: {', '.join(known)}." if known else "Leave it out, or evaluate with evaluate.incumbents.",
        )
    return Comparison(first.treatment, known[against], folder / FOLDER / f"against-{quote(against, safe=' ')}")


def open_sample(compared: Comparison, evidence: Evidence, items: Sequence[Item], count: int | None) -> ReviewSample:
    """Return the comparison's sample: the existing one, or a new one of ``count`` items (None: `ITEMS`)."""
    sample = load_sample(compared.folder, evidence)
    if sample is None:
        return draw_sample(compared, evidence, items, ITEMS if count is None else count)
    if count is not None and min(count, sum(s.items for s in sample.strata)) != len(sample.order):
        raise UserError(
            f"The sample of this evaluation has {len(sample.order)} items and cannot be changed",
            where="--items",
            fix="Leave the option out.",
        )
    return sample


def keep_sample(folder: Path, evidence: Evidence, sample: ReviewSample) -> None:
    """Record the sample, unless it is already recorded."""
    there = load_sample(folder, evidence)
    if there is None:
        write_json(folder / SAMPLE_FILE, sample.model_dump(mode="json"))
    elif there != sample:
        raise UserError(
            "Another sample was drawn at the same time", where=str(folder / SAMPLE_FILE), fix="Run the command again."
        )


def load_sample(folder: Path, evidence: Evidence) -> ReviewSample | None:
    """Return the existing sample, if any."""
    path = folder / SAMPLE_FILE
    if not path.exists():
        return None
    sample = parse_line(ReviewSample.model_validate_json, path.read_bytes(), str(path), "Invalid sample")
    if sample.evaluation != evidence.id:
        what = f"The sample belongs to evaluation {sample.evaluation}, not to {evidence.id}"
        raise UserError(what, where=str(path), fix="Restore the file.")
    return sample


def draw_sample(compared: Comparison, evidence: Evidence, items: Sequence[Item], count: int) -> ReviewSample:
    """Draw from the items for which the two arms' answers differ."""
    strata = stratify(items, compared.treatment, compared.control, evidence.metric)
    if not strata:
        raise UserError(
            f"{compared.treatment} and {compared.control} answer all {len(items):,} test items alike, "
            "so there is nothing to compare"
        )
    # Each comparison has a seed of its own: with a common seed, one comparison would reveal the
    # treatment's side in the other.
    decides = {"review": evidence.id}
    if compared.control != evidence.contrasts[0].control:
        decides["against"] = compared.control
    seed = int(digest(decides)[:12], 16)
    chosen = draw(strata, count, seed)
    names = [strata[key] for key in chosen]
    sizes = [(name, sum(each == name for each in strata.values()), names.count(name)) for name in STRATA]
    return ReviewSample(
        evaluation=evidence.id,
        treatment=compared.treatment,
        control=compared.control,
        metric=evidence.metric,
        seed=seed,
        items=len(items),
        same=len(items) - len(strata),
        strata=tuple(StratumSize(name=name, items=size, asked=asked) for name, size, asked in sizes if size),
        order=tuple(chosen),
    )


def stratify(items: Sequence[Item], treatment: str, control: str, metric: MetricName) -> dict[str, StratumName]:
    """Return the stratum of each item whose answers differ (after `normalised`), by pair key.

    In ``fixed`` the metric scores the treatment higher, in ``broken`` lower. In ``both right`` both have the full
    score. In ``both wrong`` they share a lower score, or the item is not scored in both arms.
    """
    different = [i for i in items if normalised(i.answers[treatment]) != normalised(i.answers[control])]
    return {i.key: _stratum(i.scores[metric], treatment, control) for i in different}


def _stratum(scores: Mapping[str, float], treatment: str, control: str) -> StratumName:
    if treatment not in scores or control not in scores:
        return "both wrong"
    ours, theirs = scores[treatment], scores[control]
    if ours != theirs:
        return "fixed" if ours > theirs else "broken"
    return "both right" if ours == 1 else "both wrong"


def draw(strata: Mapping[str, StratumName], count: int, seed: int) -> list[str]:
    """Draw ``count`` keys at random within each stratum, without replacement, and shuffle them over all strata.

    A reviewer who stops early has then judged a random part of each stratum.
    """
    rng = np.random.default_rng(seed)
    by_name = {name: sorted(key for key in strata if strata[key] == name) for name in STRATA}
    asked = allocate({name: len(keys) for name, keys in by_name.items() if keys}, count)
    chosen = [key for name, size in asked.items() for key in rng.permutation(by_name[name])[:size].tolist()]
    shuffled: list[str] = rng.permutation(sorted(chosen)).tolist()
    return shuffled


def allocate(sizes: Mapping[StratumName, int], count: int) -> dict[StratumName, int]:
    """Allocate the draws to strata: proportional to size, but at least `SMALLEST` where available."""
    total = sum(sizes.values())
    count = min(count, total)
    least = min(SMALLEST, count // len(sizes))
    if least < 2 and count < total:  # a single item of a stratum has no variance to estimate
        raise UserError(
            f"{count} items are too few: the sample needs 2 of each kind ({', '.join(sizes)})",
            where="--items",
            fix=f"Use --items {2 * len(sizes)} or more.",
        )
    asked = {name: min(least, size) for name, size in sizes.items()}
    while sum(asked.values()) < count:
        short = {name: count * size / total - asked[name] for name, size in sizes.items() if asked[name] < size}
        asked[max(short, key=lambda name: short[name])] += 1
    return asked


def treatment_is_a(seed: int, key: str) -> bool:
    """Return whether the treatment's answer is shown as A: a fair coin that only the seed and the item decide."""
    return bool(hashlib.sha256(f"{seed}:{key}".encode()).digest()[0] & 1)
