"""Selection of rows by key, query, source file or group."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jmespath.exceptions import JMESPathError

from tunewright.core.csv import read_sheet
from tunewright.core.errors import UserError
from tunewright.core.io import text_lines
from tunewright.data.options import RemoveOptions
from tunewright.data.readers.mapping import compile_jmespath, search_jmespath
from tunewright.data.trace import Origins, source_name
from tunewright.data.versions import Member, short

_FEWEST_DIGITS = 4
_MOST = 10


def row_document(member: Member, origins: Origins) -> dict[str, Any]:
    """Return a row as ``--where`` sees it and ``data remove --json`` prints it."""
    source, line = origins.first.get(member.key, (None, None))
    return {
        "key": member.key,
        "input": member.example.input_text,
        "output": member.example.output,
        "split": member.split,
        "source": source,
        "line": line,
        "groups": list(member.groups),
        "mixed": member.mixed,
        "metadata": origins.metadata.get(member.key, {}),
        "messages": [message.as_dict() for message in member.example.messages],
    }


def select(
    options: RemoveOptions, members: Mapping[str, Member], former: Iterable[str], origins: Origins, dataset: Path
) -> list[Member]:
    """Return the members that a selection matches, in the order of their keys.

    A file of keys may also name ``former`` rows, which were removed.
    """
    if not options.selection:
        raise UserError("No rows are selected", where="data remove", fix="Use --keys, --where, --source or --group.")
    found = dict(members)
    if options.keys is not None:
        named = _named(Path(options.keys), members, set(former))
        found = {key: member for key, member in found.items() if key in named}
    if options.source is not None:
        source = source_name(options.source, origins.sources, dataset.parent, "--source")
        found = {key: member for key, member in found.items() if origins.first.get(key, ("", 0))[0] == source}
    if options.groups:
        groups = set(options.groups)
        there = {value for member in members.values() for value in member.groups}
        if missing := [group for group in options.groups if group not in there]:
            names = ", ".join(f"{name}=…" for name in sorted({value.partition("=")[0] for value in there}))
            fix = f"Existing groups: {names}." if names else "No row has a group (data.group_by)."
            raise UserError(f"No row has the group {missing[0]!r}", where="--group", fix=fix)
        found = {key: member for key, member in found.items() if groups & set(member.groups)}
    if options.where is not None:
        matches = _query(options.where)
        found = {key: member for key, member in found.items() if matches(row_document(member, origins))}
    return [found[key] for key in sorted(found)]


def count_rows_of_earlier_files(
    options: RemoveOptions, members: Iterable[Member], origins: Origins, dataset: Path
) -> int:
    """Count the rows of a source that stay because another file had them first."""
    if options.source is None:
        return 0
    source = source_name(options.source, origins.sources, dataset.parent, "--source")
    return sum(
        source in origins.again.get(m.key, ()) and origins.first.get(m.key, ("", 0))[0] != source for m in members
    )


def _named(path: Path, members: Mapping[str, Member], former: set[str]) -> set[str]:
    """Return the keys of the rows that a file names."""
    keys = sorted(members.keys() | former)
    found: set[str] = set()
    wrong: list[str] = []
    for where, given in _names(path):
        name = given.get("key") if isinstance(given, dict) else given
        if not isinstance(name, str) or not re.fullmatch(f"[0-9a-fA-F]{{{_FEWEST_DIGITS},64}}", name):
            raise UserError(
                f"Not a row's key: {str(name)[:80]!r}",
                where=where,
                fix=f"Write one key per line (at least its first {_FEWEST_DIGITS} digits) or an object with `key`. "
                "Output of `data suspects --json` or `data show --json`, and CSV with a column `key` or `row`, work "
                "too.",
            )
        name = name.lower()
        matching = keys[bisect_left(keys, name) : bisect_right(keys, name + "g")]
        if len(matching) == 1:
            found.add(matching[0])
        else:
            what = f"{len(matching)} keys begin with" if matching else "no row has the key"
            wrong.append(f"  {where}: {what} {name}")
    if wrong:
        more = f"\n  and {len(wrong) - _MOST:,} more" if len(wrong) > _MOST else ""
        lines = "\n".join(wrong[:_MOST])
        raise UserError(f"{len(wrong):,} keys match no single row, nothing was removed\n{lines}{more}", where="--keys")
    if not found:
        raise UserError("The file has no key", where=str(path))
    return found


def _names(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each place in a file of keys, with the JSON value or the text there.

    The file has a key or a JSON object per line, or is the --json output of `data show`, `data
    suspects` or `data remove`. A CSV with a column `key` or `row` (`data review --export`) also works.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"Cannot read the file: {reason}", where=str(path)) from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            document = json.loads(text)
        except ValueError:  # several objects, one a line
            pass
        else:
            if isinstance(document, dict) and "key" not in document:
                document = next((document[name] for name in ("suspects", "rows") if name in document), document)
            listed = document if isinstance(document, list) else [document]
            yield from ((f"{path}, item {n}" if len(listed) > 1 else str(path), v) for n, v in enumerate(listed, 1))
            return
    lines = text_lines(text)
    header = re.split("[,;\t]", lines[0].replace('"', "").strip()) if lines else []
    column = next((name for name in ("key", "row") if name in header), None)
    if column is not None:
        for number, cells in read_sheet(path, [column], "tunewright data review --export"):
            yield f"{path}:{number}", cells[column]
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line) if line.strip().startswith("{") else line.strip()
            except ValueError:
                raise UserError("Not a JSON object", where=f"{path}:{number}") from None
            yield f"{path}:{number}", value


def _query(expression: str) -> Any:
    compiled = compile_jmespath(expression, "--where", _EXAMPLES)

    def matches(document: dict[str, Any]) -> bool:
        try:
            value = search_jmespath(compiled, document)
        except JMESPathError as error:
            what = f"The expression fails on row {short(document['key'])}: {error}"
            raise UserError(what, where="--where", fix=_EXAMPLES) from None
        return value is not None and value is not False and value not in ("", [], {})

    return matches


_EXAMPLES = (
    "Examples: \"output == 'cancel'\", \"contains(input, 'ACME')\", \"metadata.id == '17'\", "
    "\"split == 'train' && starts_with(source, 'old/')\"."
)
