"""Config-defined values of a row: input and output by key or Jinja template, and groups from objects above the row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jmespath
from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jmespath.exceptions import JMESPathError

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.text import first_of
from tunewright.data.readers.row_errors import JsonPath, RowError
from tunewright.data.readers.sandbox import parse_template, render

PARENT = "parent"
Parent = Mapping[str, Any]
"""The nearest object above a row, with the next one above it under the key ``parent``."""


def compile_jmespath(expression: str, where: str, fix: str) -> jmespath.parser.ParsedResult:
    """Return the compiled JMESPath expression."""
    try:
        return jmespath.compile(expression)
    except (ValueError, RecursionError) as error:  # JMESPath's errors are ValueErrors, as are too many digits
        what = f"Invalid JMESPath expression: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError(what, where=where, fix=fix) from None


def search_jmespath(compiled: jmespath.parser.ParsedResult, value: Any) -> Any:
    """Return what a compiled expression selects."""
    try:
        return compiled.search(value)
    except JMESPathError:
        raise
    except _FAILURES as error:  # not every function checks its types: merge(@, `1`)
        raise JMESPathError(str(error) or type(error).__name__) from None


def names_parent(group: str, data: DataConfig) -> bool:
    """Return whether a key of ``data.group_by`` is a JMESPath above the row, such as ``parent.id``."""
    return data.rows is not None and group.startswith((f"{PARENT}.", f"{PARENT}["))


def check_groups(data: DataConfig) -> None:
    """Refuse a group above the rows that is not a JMESPath."""
    for group in data.group_by:
        if names_parent(group, data):
            _expression(group)


_expression = lru_cache(maxsize=16)(
    partial(
        compile_jmespath,
        where="data.group_by",
        fix="Such as parent.id, parent.sql[0] or parent.parent.title: docs/how-to/file-formats.md.",
    )
)


def value_above(group: str, parent: Parent | None) -> Any:
    """Return a group's value for the rows below an object."""
    try:
        value = search_jmespath(_expression(group), {PARENT: parent})
    except JMESPathError as error:
        raise RowError("E205", f"data.group_by: {group!r} fails above the row: {error}") from None
    if value is None:
        raise RowError("E205", f"data.group_by: {group!r} selects nothing above the row")
    return value


def require_groups_found(groups: Iterable[str], parents: Iterable[Parent | None], path: object) -> None:
    """Refuse a group that is not found above any row of a document, given the object above each row."""
    different = list({id(parent): parent for parent in parents}.values())
    for group in groups:
        for parent in different:
            with suppress(RowError):
                value_above(group, parent)
                break
        else:
            keys = list(dict.fromkeys(key for parent in different[:1] if parent for key in parent if key != PARENT))
            fix = (
                f"Keys of the object above a row: {first_of(keys)}." if keys else "There are no objects above the rows."
            )
            raise UserError(f"{group!r} selects nothing above any row of {path}", where="data.group_by", fix=fix)


_ROW, _ABOVE = "row", "above"
# Exceptions of template operations on unexpected values.
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,  # jinja2 writes 1e999 as inf into its Python code
    TypeError,
    ValueError,
    RecursionError,
    MemoryError,
)


class Row(dict[str, Any]):
    """A row in templates: ``row[0]`` is its key "0", as the columns of an array are named."""

    __module__ = "builtins"  # for Jinja's messages: "Row object has no element 5"

    def __missing__(self, key: object) -> Any:
        if not isinstance(key, int):
            raise KeyError(key)
        return self[str(key)]


@dataclass(frozen=True)
class MappedField:
    """A side of the pair (``data.input`` or ``data.output``), by key or template."""

    field: str
    text: str
    """Text in the config."""
    template: Template | None
    keys: tuple[str, ...]
    """Keys of the row that are used, in order."""
    whole_row: bool = False
    """True if the template uses ``row`` as a whole, so that any key may be used."""
    outside: tuple[str, ...] = ()
    """The variables among ``above`` and ``parent`` that the template uses."""

    @property
    def path(self) -> JsonPath:
        """Place in the row for faults of this side: its key, or for a template the row."""
        return (self.text,) if self.template is None else ()

    def value(self, row: Mapping[str, Any], above: JsonPath, parent: Parent | None = None) -> Any:
        """Return the value of the key, or the text of the template."""
        if self.template is None:
            if self.text not in row:
                raise RowError("E207", f'missing key "{self.text}" of {self.field}')
            return row[self.text]
        from_above = {PARENT: parent} if PARENT in self.outside else {}
        if from_above and parent is None:
            raise RowError("E207", f"{self.field} uses parent, but there is no object above the row")
        try:
            return render(self.template, {**row, _ROW: Row(row), _ABOVE: above, **from_above})
        except RowError as error:
            raise RowError(error.code, f"{self.field}: {error}") from None
        except _FAILURES as error:
            raise RowError("E207", f"{self.field}: {error or type(error).__name__}") from None


@dataclass(frozen=True)
class PairMapping:
    """The config's mapping from rows to pairs."""

    input: MappedField
    output: MappedField

    @property
    def templated(self) -> bool:
        """True if a side is a template; without templates, rows without both keys may have another format."""
        return self.input.template is not None or self.output.template is not None

    @cached_property
    def keys(self) -> frozenset[str]:
        """Keys of the row that are used by name."""
        return frozenset((*self.input.keys, *self.output.keys))

    @property
    def whole_row(self) -> bool:
        """True if any key may be used."""
        return self.input.whole_row or self.output.whole_row

    @property
    def reason(self) -> str:
        """Text on the mapping: ``the config maps question to the input and reply to the output``."""
        parts = []
        for side, name in ((self.input, "input"), (self.output, "output")):
            whole = ["the whole row"] if side.whole_row else []
            parts.append(f"{', '.join([*side.keys, *whole, *side.outside]) or 'a fixed text'} to the {name}")
        return f"the config maps {' and '.join(parts)}"

    def columns(self, header: Sequence[str]) -> list[str]:
        """Return the columns of a table that are used."""
        return list(dict.fromkeys((*self.input.keys, *self.output.keys, *(header if self.whole_row else ()))))


def pair_mapping(data: DataConfig) -> PairMapping | None:
    """Return the config's mapping, or None if a side is not named and there is no template."""
    return _mapping(data.input, data.output, data.drop_columns, data.rows is not None)


@lru_cache(maxsize=16)
def _mapping(input_: str | None, output: str | None, ignore: tuple[str, ...], in_document: bool) -> PairMapping | None:
    if input_ is None or output is None:
        for field_name, given, other in (("input", input_, "output"), ("output", output, "input")):
            if given is not None and _is_template(given):
                what = f"data.{field_name} is a template, but data.{other} is not set"
                raise UserError(what, where=_where(other), fix="Set both, to a template or the name of a key.")
        return None
    if input_ == output:
        fix = "Use another column for one of them."
        raise UserError(f'"{input_}" cannot be both input and output', where=_where("output"), fix=fix)
    sides = [_side(name, text, in_document) for name, text in (("input", input_), ("output", output))]
    for side in sides:
        left_out = [key for key in side.keys if key in ignore]
        if left_out:
            what = f'{side.field} uses the key "{left_out[0]}", which data.drop_columns drops'
            raise UserError(what, where="data.drop_columns", fix="Remove it there, or from the template.")
    return PairMapping(*sides)


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _where(name: str) -> str:
    return f"data.{name} (--{name})"


def _side(name: str, text: str, in_document: bool) -> MappedField:
    if not _is_template(text):
        return MappedField(f"data.{name}", text, None, (text,))
    try:
        tree, template = parse_template(text)
        names = meta.find_undeclared_variables(tree)
    except (TemplateSyntaxError, SyntaxError) as error:
        reason = error.message if isinstance(error, TemplateSyntaxError) else error.msg
        what = f"Invalid template: line {error.lineno}: {reason}"
        raise UserError(what, where=_where(name), fix=_HELP) from None
    except RecursionError:
        raise UserError("Invalid template: nested too deep", where=_where(name), fix=_HELP) from None
    if _ABOVE in names and not in_document:
        what = "The template uses above, which requires data.rows"
        raise UserError(what, where=_where(name), fix="Set the place of the rows in the document: data.rows (--rows).")
    picked = [
        str(each.arg.value)
        for each in tree.find_all(nodes.Getitem)
        if _is_row(each.node) and isinstance(each.arg, nodes.Const) and isinstance(each.arg.value, str | int)
    ]
    whole = sum(map(_is_row, tree.find_all(nodes.Name))) > len(picked)
    outside = {_ABOVE, PARENT} if in_document else {_ABOVE}
    of_row = names - outside - {_ROW}
    in_order = [node.name for node in tree.find_all(nodes.Name) if node.name in of_row]
    keys = dict.fromkeys([*in_order, *picked])
    return MappedField(f"data.{name}", text, template, tuple(keys), whole, tuple(sorted(outside & names)))


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _ROW and node.ctx == "load"


_HELP = (
    'Use a Jinja template over the row\'s keys, such as {{ question }} or {{ row["my column"] }} '
    "(docs/how-to/file-formats.md)."
)
