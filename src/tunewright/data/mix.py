"""The generic mix-in: instruction data from outside the domain, added to the training rows against forgetting."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunewright.config import Config, DataConfig, MixConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data import notices, pii
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.decontaminate import find_hits
from tunewright.data.dedup.shingles import Indices, Mask
from tunewright.data.dedup.similarity import near_pairs
from tunewright.data.examples import Example
from tunewright.data.readers import SourceRow, read_pairs, source_digest, source_size
from tunewright.data.readers.validate import counted
from tunewright.data.versions import Member, Mix, SourceFile, short

_SPARE = 50  # extra rows to read, so that a few rejected rows need no second pass


@dataclass(frozen=True)
class DrawnMix:
    """The rows drawn, as members of the training split, and the rows rejected, with reasons."""

    members: list[Member]
    rows: list[SourceRow]
    left_out: list[tuple[SourceRow, str]]
    wanted: int
    about: Mix


def mix_in(
    root: Path,
    config: Config,
    mix: MixConfig,
    domain: Sequence[Member],
    benchmarks: dict[str, list[str]],
    reporter: Reporter,
    removed: Collection[str] = (),
) -> DrawnMix:
    """Draw the mix-in for these domain rows.

    The seed and the rows' keys decide the order, so that a version with more training rows keeps
    the previous draw and extends it. Rows are rejected if their input is (nearly) equal to a domain
    row's. They are also rejected if they contain a held-out row, a benchmark item or secrets.

    ``removed`` are pair keys of rows that were removed earlier.
    """
    path = root / mix.source
    rows = _read(path, config.data, mix, config.seed, reporter)
    training = sum(m.split == "train" for m in domain)
    # The fraction is of all training rows, mixed-in ones included: m / (t + m) = f, so m = t f / (1 - f).
    wanted = max(1, round(training * mix.fraction / (1 - mix.fraction)))
    inputs = {m.example.input_text for m in domain}
    rows, gone = ([row for row in rows if (row.example.pair_key in removed) is out] for out in (False, True))
    fresh = [row for row in rows if row.example.input_text not in inputs]
    left_out = [(row, "an input of the domain") for row in rows if row.example.input_text in inputs]
    left_out += [(row, "removed earlier") for row in gone]
    drawn: list[SourceRow] = []
    looked = 0
    while len(drawn) < wanted and looked < len(fresh):
        batch = fresh[looked : looked + wanted - len(drawn) + _SPARE]
        examples = {row.example.pair_key: row.example for row in batch}
        reasons = exclusion_reasons(examples, domain, config.data, benchmarks, reporter, "the mix-in")
        for row in batch:
            if len(drawn) == wanted:
                break
            looked += 1
            reason = reasons.get(row.example.pair_key)
            if reason is None:
                drawn.append(row)
            else:
                left_out.append((row, reason))
    if not drawn:
        row, reason = left_out[0]
        fix = f"Name another file. Its first row, {row.source}:{row.line}: {reason}."
        raise UserError("No row of the file can be mixed in", where=f"data.mix.source: {path}", fix=fix)
    source = SourceFile(name=Path(mix.source).as_posix(), sha256=source_digest(path), rows=len(rows))
    members = [
        Member(row.example, row.example.pair_key, "train", row.example.pair_key, mixed=True)
        for row in sorted(drawn, key=lambda row: row.example.pair_key)
    ]
    about = Mix(source=source, fraction=mix.fraction, drawn=len(drawn), left_out=len(left_out))
    return DrawnMix(members, drawn, left_out, wanted, about)


def _read(path: Path, data: DataConfig, mix: MixConfig, seed: int, reporter: Reporter) -> list[SourceRow]:
    """Return the source's distinct rows, in draw order."""
    own = DataConfig(**mix.model_dump(exclude={"source", "fraction"}), max_characters=data.max_characters)
    with reporter.task("reading the mix-in", source_size(path), "bytes") as task:
        reading = read_pairs(path, own, task)
    if reading.faults:
        raise notices.faulty(reading.faults)
    extra = Counter(key for row in reading.rows for key in row.metadata)
    if extra:
        reporter.say(f"{path}: metadata not kept for mixed-in rows: {counted(extra)}")
    first: dict[str, SourceRow] = {}
    for row in reading.rows:
        first.setdefault(row.example.pair_key, row)
    return sorted(first.values(), key=lambda row: hashlib.sha256(f"{seed}:{row.example.pair_key}".encode()).digest())


def exclusion_reasons(
    examples: Mapping[str, Example],
    domain: Sequence[Member],
    data: DataConfig,
    benchmarks: Mapping[str, Sequence[str]],
    reporter: Reporter,
    what: str,
) -> dict[str, str]:
    """Return the reason to reject each row from outside the domain that cannot be trained on, by key.

    Such rows are nearly equal to a domain row, contain a held-out row or a benchmark item, or contain secrets.
    ``benchmarks`` maps a file's name to the texts of its items; ``what`` names the rows in the progress title.
    """
    held_out = [m for m in domain if m.split != "train"]
    reasons = _near_reasons(examples, domain, data.dedup_threshold, reporter, what)
    against = {"held-out rows": [m.example.input_text for m in held_out], **benchmarks}
    for hit in find_hits(examples, against, reporter):
        reasons.setdefault(hit.row, f"{hit.how} with item {hit.item + 1} of {hit.source}")
    for place in pii.scan(list(examples.items()), reporter, allow=data.allow).of("secret"):
        reasons.setdefault(place.row, f"contains a secret ({pii.LABELS[place.finding.kind]})")
    return reasons


def _near_reasons(
    examples: Mapping[str, Example], domain: Sequence[Member], similarity: float, reporter: Reporter, what: str
) -> dict[str, str]:
    keys = list(examples)
    texts = comparison_texts([*examples.values(), *(m.example for m in domain)])

    def wanted(first: Indices, second: Indices) -> Mask:
        mask: Mask = (np.minimum(first, second) < len(keys)) & (np.maximum(first, second) >= len(keys))
        return mask

    reasons: dict[str, str] = {}
    for pairs in near_pairs(texts, similarity, wanted, reporter, f"comparing {what} with the domain"):
        for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            row, other = sorted(pair)
            near = domain[other - len(keys)]
            held_out = "" if near.split == "train" else f"held-out ({near.split}) "
            reasons.setdefault(keys[row], f"nearly equal to the {held_out}row {short(near.key)}")
    return reasons
