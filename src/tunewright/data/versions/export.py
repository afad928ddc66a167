"""Export of a dataset version to a file for other tools."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tunewright.core.csv import safe_cell
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, new_file, write_json, write_text
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data.examples import Example
from tunewright.data.readers.validate import rejected_messages
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member, short

Format = Literal["chat", "alpaca", "csv", "parquet", "preference"]
FORMATS: tuple[Format, ...] = get_args(Format)

_NAMED = 5  # rows named in a refusal


@dataclass(frozen=True)
class Exported:
    """Result of an export; ``system`` is the turn that all rows share and that CSV cannot store."""

    path: Path
    format: Format
    version: str
    split: Split | None
    rows: int
    system: str | None = None


def export(
    version: DatasetVersion,
    path: Path,
    form: Format,
    reporter: Reporter,
    *,
    split: Split | None = None,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    rejected: Mapping[str, Sequence[Any]] | None = None,
) -> Exported:
    """Write a version, or one split of it, to a file, atomically.

    chat: JSON lines of ``{"messages": [...], "tools": [...]}`` (OpenAI's format), tools only if the row has any.
    alpaca: one JSON array of instruction, input (always empty), output and, where a row has a system turn, system.
    csv: the columns prompt and completion. parquet: the column messages (and tools, as JSON, if a row has any), zstd,
    with the version's digest in the schema's metadata. preference: JSON lines of prompt, chosen and rejected, each a
    list of turns (TRL's format), one for each rejected answer; other rows are left out.

    Args:
        metadata: pair key to the keys to put before the messages of a chat row; None: write messages only.
        rejected: pair key to the rejected answers, for the format preference.

    Raises:
        UserError: metadata in a format other than chat, rows that the format cannot represent (named; nothing is
            written), an existing file, an empty split, an unknown format or split, a full disk.
    """
    if form not in FORMATS:
        raise UserError(f"Unknown format {form!r}", where="--format", fix=f"Formats: {', '.join(FORMATS)}.")
    if split is not None and split not in SPLITS:
        raise UserError(f"Unknown split {split!r}", where="--split", fix=f"Splits: {', '.join(SPLITS)}.")
    if path.exists():
        raise UserError("The file exists already", where=str(path), fix="Choose another name, or delete it first.")
    if metadata is not None and form != "chat":
        raise UserError(f"--metadata requires the format chat (got {form})", fix="Export as chat.")
    members = [m for m in version.members if split in (None, m.split)]
    if not members:
        raise UserError(f"Version {short(version.digest)} has no {split} rows", where="--split")
    if form == "preference":
        return Exported(path, form, version.digest, split, _write_preferences(path, members, rejected or {}, reporter))
    system = _fit(members, form)
    examples = [m.example for m in members]
    with reporter.task("exporting", 1, "files") as task:
        if form == "chat":
            rows = ({**(metadata or {}).get(m.key, {}), **m.example.as_row()} for m in members)
            write_text(path, "".join(canonical_json(row) + "\n" for row in rows))
        elif form == "alpaca":
            _write_alpaca(path, examples)
        elif form == "csv":
            _write_csv(path, examples)
        else:
            _write_parquet(path, examples, {"tunewright.version": version.digest, "tunewright.split": split or "all"})
        task.advance()
    mixed = sum(m.mixed for m in members)
    if mixed:
        reporter.warn(
            f"{mixed:,} of the {len(members):,} rows are generic mix-in, which the file does not mark. Added to a "
            "dataset, they would become domain rows."
        )
    if system is not None:
        reporter.warn(
            f"CSV cannot store the system turn that all {len(members):,} rows share: it is not in {path}. To read the "
            f"file back as the same examples, set data.system_prompt to: {system}"
        )
    formulas = [e for e in examples if any(safe_cell(text) != text for text in (e.prompt[-1].content, e.output))]
    if form == "csv" and formulas:
        reporter.warn(
            f"{count_of(len(formulas), 'row')} of {path} begin as a formula, and are written unchanged for other "
            "tools. A spreadsheet may run them: import the columns as text."
        )
    return Exported(path, form, version.digest, split, len(members), system)


def _fit(members: Sequence[Member], form: Format) -> str | None:
    """Return the system turn that all rows share, if the format cannot store it."""
    if form in ("chat", "parquet"):
        return None
    _refuse(members, form, "functions and calls", lambda e: e.messages[0].role == "tools")
    _refuse(members, form, "weights on turns", lambda e: any(m.weight != 1 for m in e.messages))
    _refuse(members, form, "conversations of several turns", lambda e: sum(m.role == "user" for m in e.messages) > 1)
    systems = {m.example.messages[0].content if m.example.messages[0].role == "system" else None for m in members}
    if form == "alpaca" or systems == {None}:
        return None
    if len(systems) > 1:
        common = max(systems, key=lambda s: sum(_system(m.example) == s for m in members))
        _refuse(members, form, "system turns that differ between rows", lambda e: _system(e) != common)
    return systems.pop()


def _system(example: Example) -> str | None:
    first = example.messages[0]
    return first.content if first.role == "system" else None


def _refuse(members: Sequence[Member], form: Format, what: str, wrong: Callable[[Example], bool]) -> None:
    found = [short(m.key) for m in members if wrong(m.example)]
    if found:
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        raise UserError(
            f"{form} cannot represent {what}, which {len(found):,} of {len(members):,} rows have: "
            f"{', '.join(found[:_NAMED])}{more}",
            where="--format",
            fix="Export as chat or parquet.",
        )


def _write_preferences(
    path: Path, members: Sequence[Member], rejected: Mapping[str, Sequence[Any]], reporter: Reporter
) -> int:
    """Write a line for each rejected answer, and return the number of lines."""
    lines = []
    for member in members:
        messages = member.example.messages
        asked = max(i for i, message in enumerate(messages) if message.role == "user") + 1
        prompt, chosen = ([turn.as_dict() for turn in part] for part in (messages[:asked], messages[asked:]))
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen}
        if messages[0].role == "tools":
            row |= {"prompt": prompt[1:], "tools": json.loads(messages[0].content)}
        for answer in rejected.get(member.key, ()):
            turns = [turn.as_dict() for turn in rejected_messages(answer)]
            if turns != chosen:  # a reviewer may have chosen it since
                lines.append(canonical_json({**row, "rejected": turns}))
    if not lines:
        what = "No row has a rejected answer"
        raise UserError(what, where="--format", fix="Add preference rows, or export as chat.")
    write_text(path, "".join(line + "\n" for line in lines))
    without = sum(member.key not in rejected for member in members)
    if without:
        reporter.warn(f"{count_of(without, 'row')} without a rejected answer left out of {path}")
    return len(lines)


def _write_alpaca(path: Path, examples: Sequence[Example]) -> None:
    rows = []
    for example in examples:
        row = {"instruction": example.prompt[-1].content, "input": "", "output": example.output}
        system = _system(example)
        rows.append(row if system is None else {**row, "system": system})
    write_json(path, rows)


def _write_csv(path: Path, examples: Sequence[Example]) -> None:
    text = io.StringIO(newline="")
    # Quote every field: some readers take a lone carriage return outside of quotes for a line break.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "completion"])
    writer.writerows([e.prompt[-1].content, e.output] for e in examples)
    write_text(path, text.getvalue())


def _write_parquet(path: Path, examples: Sequence[Example], facts: dict[str, str]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    fields = [pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)]
    # Only if a row needs it: some readers refuse turns with an unknown key.
    if any(m.weight != 1 for e in examples for m in e.messages):
        fields.append(pa.field("weight", pa.int8()))
    columns = []
    if any(m.calls for e in examples for m in e.messages):
        function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
        call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
        fields += [pa.field("tool_calls", pa.list_(call)), pa.field("tool_call_id", pa.string())]
    rows = [e.as_row() for e in examples]
    if any("tools" in row for row in rows):
        columns.append(pa.field("tools", pa.string()))  # as JSON: a column has one type, but schemas differ
        rows = [{**row, "tools": canonical_json(row["tools"])} if "tools" in row else row for row in rows]
    columns.insert(0, pa.field("messages", pa.list_(pa.struct(fields)), nullable=False))
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata=facts))
    with new_file(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
