"""The generic mix-in: instruction data that is not of the domain, among the training rows, against forgetting."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.config import Config, DataConfig, MixConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data import notices
from tunewright.data.mix_filter import unfit
from tunewright.data.readers import SourceRow, read_pairs, source_digest, source_size
from tunewright.data.readers.metadata import counted
from tunewright.data.versions import Member, Mix, Source

_SPARE = 50  # rows looked at beyond those that are needed, so that a few that are left out cost no second look


@dataclass(frozen=True)
class Mixed:
    """The rows that were drawn, as members of the training split; and those that came up and were left out, and why."""

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
) -> Mixed:
    """Draw the mix-in for a version of these domain rows.

    Rows come in an order drawn from the seed and their keys, so that a version with more training rows has those of the
    version before and more. Passed over, with the reason: rows with an input of the domain or one nearly equal to it,
    rows that hold a held-out row or a benchmark item, and rows with secrets.

    Args:
        root: the project's folder, from which the source is named.
        domain: all rows of the domain with their splits.
        benchmarks: file name to the texts of its items.
        removed: pair keys of rows that were removed earlier.

    Raises:
        UserError: the source cannot be read, has faulty rows, or nothing in it may be used.
    """
    path = root / mix.source
    rows = _read(path, config.data, mix, config.seed, reporter)
    training = sum(m.split == "train" for m in domain)
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
        reasons = unfit(examples, domain, config.data, benchmarks, reporter, "the mix-in")
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
        raise UserError("no row of it may be mixed in", where=f"data.mix.source: {path}", fix=_first(left_out))
    source = Source(name=Path(mix.source).as_posix(), sha256=source_digest(path), rows=len(rows))
    members = [
        Member(row.example, row.example.pair_key, "train", row.example.pair_key, mixed=True)
        for row in sorted(drawn, key=lambda row: row.example.pair_key)
    ]
    about = Mix(source=source, fraction=mix.fraction, drawn=len(drawn), left_out=len(left_out))
    return Mixed(members, drawn, left_out, wanted, about)


def _read(path: Path, data: DataConfig, mix: MixConfig, seed: int, reporter: Reporter) -> list[SourceRow]:
    """Return the source's different rows, in the order of the draw."""
    own = DataConfig(
        rows=mix.rows,
        input=mix.input,
        output=mix.output,
        drop_columns=mix.drop_columns,
        max_characters=data.max_characters,
    )
    with reporter.task("reading the mix-in", source_size(path), "bytes") as task:
        reading = read_pairs(path, own, task)
    if reading.faults:
        raise notices.faulty(reading.faults)
    extra = Counter(key for row in reading.rows for key in row.metadata)
    if extra:
        reporter.say(f"{path}: not kept with the rows that are mixed in: {counted(extra)}")
    first: dict[str, SourceRow] = {}
    for row in reading.rows:
        first.setdefault(row.example.pair_key, row)
    return sorted(first.values(), key=lambda row: _lot(seed, row.example.pair_key))


def _lot(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _first(left_out: Sequence[tuple[SourceRow, str]]) -> str:
    row, reason = left_out[0]
    return f"Name another file. Its first row, {row.source}:{row.line}: {reason}."
