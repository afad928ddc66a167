"""Test rows whose output, or its template, is in training: their share here, and in a random split.

A split by input does not separate outputs. If outputs follow templates (queries, code, forms), a model can score by
choosing a template that it has seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from tunewright.core.progress import Reporter
from tunewright.core.spill import numbered
from tunewright.data.dedup.decontaminate import FEWEST, normalised_words
from tunewright.data.dedup.shingles import Indices, shingle_matrix
from tunewright.data.dedup.similarity import in_blocks
from tunewright.data.examples import find_labels, normalised, output_template
from tunewright.data.splits import MINIMUM_CLUSTERS, Split
from tunewright.data.versions import Member

HIGH = 0.5
"""Share of test rows with known output templates from which a warning is given."""

_MERGED = 0.9
"""Templates per distinct output up to which masking counts as merging outputs; above, templates are only outputs."""
LOW_CEILING = 0.05
"""Ceiling under which a split by template leaves nothing to score."""

_TEST: tuple[Split, ...] = ("test",)
_WORD = re.compile(r"\w+(?:[.:/-]\w+)*")  # "t1.name", "2026-11-30" and "j45.909" are one word each
_SAMPLE = 500  # rows compared with all others

OverlapKind = Literal["identical", "template", "near"]


@dataclass(frozen=True)
class Overlap:
    """Share of test rows with the same or a near-equal output as a training row."""

    how: OverlapKind
    """Identical (ignoring case and white space), template (equal by ``output_template``), or near (Jaccard similarity
    of character 4-grams at or above the version's ``similarity``)."""
    here: float  # in this split
    random: float  # the expected share in a random split of the same sizes


@dataclass(frozen=True)
class OutputLeakage:
    """Overlap of the test split's outputs with the training split's."""

    test: int  # test rows
    outputs: int  # distinct outputs of all rows, ignoring case and white space
    templates: int  # distinct templates of all rows
    overlaps: tuple[Overlap, ...]  # one for each ``how`` that was measured
    natural: str | None  # the reason why such an overlap is natural; None if it may be leakage
    ceiling: float | None = None
    """Share of the answers whose words all occur in their prompt or in outputs with another template: the most that a
    split by template, where no test answer is in training, can score. None if templates say nothing: the overlap is
    natural, or nearly each output is its own template (codes with names, free text)."""

    def share(self, how: OverlapKind) -> float:
        """Return the share of test rows with this kind of overlap."""
        return next(each.here for each in self.overlaps if each.how == how)

    @property
    def high(self) -> bool:
        """True if the overlap deserves a warning."""
        return self.ceiling is not None and self.share("template") >= HIGH

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**asdict(self), "high": self.high}


def measure_output_leakage(members: Sequence[Member]) -> OutputLeakage:
    """Measure identical outputs and equal templates of the domain, in linear time; ``near_overlap`` near-equal ones."""
    domain = [m for m in members if not m.mixed]
    identical = _numbers(domain, normalised)
    template = _numbers(domain, output_template)
    natural = _natural(domain, template)
    outputs, templates = len(np.unique(identical)), len(np.unique(template))
    return OutputLeakage(
        test=sum(m.split == "test" for m in domain),
        outputs=outputs,
        templates=templates,
        overlaps=(_overlap("identical", domain, identical), _overlap("template", domain, template)),
        natural=natural,
        ceiling=_ceiling(domain, template) if natural is None and templates <= _MERGED * outputs else None,
    )


def new_templates(members: Sequence[Member], splits: Collection[Split] = _TEST) -> dict[str, bool] | None:
    """Return by key whether a test row has an output template that is new; None if that is uninformative.

    The generic mix-in is ignored.
    """
    domain = [m for m in members if not m.mixed]
    if measure_output_leakage(domain).ceiling is None:
        return None
    seen = {output_template(m.example.output) for m in domain if m.split == "train"}
    return {m.key: output_template(m.example.output) not in seen for m in domain if m.split in splits}


def _natural(domain: Sequence[Member], template: Indices) -> str | None:
    if find_labels(m.example.output for m in domain):
        return "outputs are labels"
    if 2 * sum(len(normalised_words(m.example.output)) < FEWEST for m in domain) > len(domain):
        return f"most outputs have fewer than {FEWEST} words"
    sizes = np.bincount(template)
    if len(sizes) < MINIMUM_CLUSTERS or 2 * int(sizes.max()) > len(domain):
        return "most outputs have one of few templates"
    return None


def _ceiling(domain: Sequence[Member], template: Indices) -> float:
    test = [i for i, m in enumerate(domain) if m.split == "test"]
    test = test[:: len(test) // _SAMPLE + 1]
    holders: dict[str, set[int]] = {word: set() for i in test for word in _words(domain[i].example.output)}
    for member, number in zip(domain, template, strict=True):
        for word in holders.keys() & _words(member.example.output):
            if len(holders[word]) < 2:  # two are enough: at least one is another template
                holders[word].add(int(number))
    prompts = (_words(" ".join(m.text for m in domain[i].example.prompt)) for i in test)
    return _mean(
        [
            all(len(holders[word]) > 1 or word in prompt for word in _words(domain[i].example.output))
            for i, prompt in zip(test, prompts, strict=True)
        ]
    )


def _words(text: str) -> set[str]:
    return set(_WORD.findall(normalised(text)))


def _numbers(members: Sequence[Member], reduced: Callable[[str], str]) -> Indices:
    """Number the rows' distinct reduced outputs from 0, [rows]."""
    return numbered(reduced(m.example.output) for m in members)


def _overlap(how: OverlapKind, domain: Sequence[Member], numbers: Indices) -> Overlap:
    training = {int(n) for n, m in zip(numbers, domain, strict=True) if m.split == "train"}
    here = [int(n) in training for n, m in zip(numbers, domain, strict=True) if m.split == "test"]
    others = np.bincount(numbers)[numbers] - 1
    return Overlap(how, _mean(here), _chance(others, domain))


def _chance(others: Indices, domain: Sequence[Member]) -> float:
    """Return the mean probability that some of a row's ``others`` are among random training rows.

    Of n - 1 other rows, T are training rows: none of k is among them with probability C(n-1-k, T) / C(n-1, T), computed
    with log-gamma functions.
    """
    if len(domain) < 2:
        return 0.0
    rest = len(domain) - 1
    training = min(sum(m.split == "train" for m in domain), rest)
    outside = np.minimum(others, rest - training)  # more rows cannot all be outside of training
    none = gammaln(rest - outside + 1) - gammaln(rest - outside - training + 1)
    none -= gammaln(rest + 1) - gammaln(rest - training + 1)
    return _mean(np.where(others > outside, 1.0, -np.expm1(none)))


def _mean(values: Iterable[float] | npt.NDArray[Any]) -> float:
    found = np.array(values, dtype=np.float64)
    return float(found.mean()) if found.size else 0.0


def near_overlap(members: Sequence[Member], threshold: float, seed: int, reporter: Reporter) -> Overlap:
    """Measure near-equal outputs exactly, on random samples of at most 500 test rows and 500 rows of all.

    The generic mix-in is ignored, and the seed decides the samples.
    """
    domain = [m for m in members if not m.mixed]
    numbers = _numbers(domain, normalised)
    texts = list(dict.fromkeys(normalised(m.example.output) for m in domain))  # in the order of their numbers
    rng = np.random.default_rng(seed)
    test = _sample(rng, [i for i, m in enumerate(domain) if m.split == "test"])
    anyone = _sample(rng, list(range(len(domain))))
    rows = np.bincount(numbers, minlength=len(texts))
    trained = np.bincount(numbers[[i for i, m in enumerate(domain) if m.split == "train"]], minlength=len(texts))
    weights = np.stack([rows, trained], axis=1)  # [texts, 2]
    asked, place = np.unique(numbers[[*test, *anyone]], return_inverse=True)
    near = _near_rows(texts, asked, weights, threshold, reporter)[place]
    here = near[: len(test), 1] > 0
    return Overlap("near", _mean(here), _chance(near[len(test) :, 0] - 1, domain))


def _sample(rng: np.random.Generator, rows: list[int]) -> list[int]:
    return rows if len(rows) <= _SAMPLE else [int(row) for row in rng.choice(rows, _SAMPLE, replace=False)]


def _near_rows(texts: Sequence[str], asked: Indices, weights: Indices, threshold: float, reporter: Reporter) -> Indices:
    """Return the sums [asked, kinds] of the weights [texts, kinds] of all texts near each asked one, and its own."""
    everyone = np.arange(len(texts))
    with reporter.task("comparing outputs", len(asked), "outputs") as task:
        blocks = in_blocks(shingle_matrix(texts), asked, everyone, task)
        sums = [(similarity >= threshold).T.astype(np.float64) @ weights for _, similarity in blocks]
    near: Indices = np.concatenate([weights[:0], *sums]).astype(np.int64)
    return near
