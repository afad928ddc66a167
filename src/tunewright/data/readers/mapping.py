"""Input and ideal output out of a row: by the name of a key each, or by a Jinja template over the whole row."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping as AnyMapping
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers.parents import PARENT, Parent
from tunewright.data.readers.row_errors import JsonPath, RowError

_ROW, _ABOVE = "row", "above"
_PLAIN = (str, int, float, Decimal, datetime.date, datetime.time)
# What a template's own operations raise over values that they were not written for.
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Side:
    """One side of the pair: ``data.input`` or ``data.output``, and how a row becomes its text."""

    field: str
    text: str
    """As the config has it."""
    template: Template | None
    keys: tuple[str, ...]
    """The row's keys that are used, in order."""
    whole_row: bool = False
    """The template takes ``row`` as a whole, so that any key may be used."""
    outside: tuple[str, ...] = ()
    """Of ``above`` and ``parent`` those that the template takes."""

    @property
    def from_parent(self) -> bool:
        """The template takes ``parent``, the object above the row."""
        return PARENT in self.outside

    @property
    def path(self) -> JsonPath:
        """The place in the row that faults of this side name: its key, or for a template the row."""
        return (self.text,) if self.template is None else ()

    def value(self, row: AnyMapping[str, Any], above: JsonPath, parent: Parent | None = None) -> Any:
        """Return what stands there: a key's value as it is, or a template's text.

        Raises:
            RowError: the row lacks what is used, or the template fails or writes a value that is no text.
        """
        if self.template is None:
            if self.text not in row:
                raise RowError("E207", f'missing key "{self.text}", which {self.field} names')
            return row[self.text]
        if self.from_parent and parent is None:
            raise RowError("E207", f"{self.field} uses parent, and no object stands above the row")
        from_above = {PARENT: parent} if self.from_parent else {}
        try:
            return self.template.render({**row, _ROW: row, _ABOVE: above, **from_above})
        except RowError as error:
            raise RowError(error.code, f"{self.field}: {error}") from None
        except _FAILURES as error:
            raise RowError("E207", f"{self.field}: {error or type(error).__name__}") from None


@dataclass(frozen=True)
class Mapping:
    """How rows become pairs by the config."""

    input: Side
    output: Side

    @property
    def templated(self) -> bool:
        """True if a side is a template; if none is, rows without both keys may be of another kind."""
        return self.input.template is not None or self.output.template is not None

    @cached_property
    def keys(self) -> frozenset[str]:
        """The row's keys that are used by name."""
        return frozenset((*self.input.keys, *self.output.keys))

    @property
    def whole_row(self) -> bool:
        """True if any key may be used."""
        return self.input.whole_row or self.output.whole_row

    @property
    def reason(self) -> str:
        """The words that tell of the mapping: ``the config maps question to the input and reply to the output``."""
        sides = ((self.input, "input"), (self.output, "output"))
        return "the config maps " + " and ".join(f"{_named(side)} to the {name}" for side, name in sides)

    def columns(self, header: Sequence[str]) -> list[str]:
        """Return the columns of a table that are used."""
        named = list(dict.fromkeys((*self.input.keys, *self.output.keys)))
        return [*named, *(name for name in header if self.whole_row and name not in named)]


def _named(side: Side) -> str:
    whole = ["the whole row"] if side.whole_row else []
    return ", ".join([*side.keys, *whole, *side.outside]) or "a fixed text"


def mapping_of(data: DataConfig) -> Mapping | None:
    """Return the config's mapping, or None where it does not name both sides and neither is a template.

    Raises:
        UserError: a template that is none, or without the other side; a key used that data.drop_columns leaves out.
    """
    return _mapping(data.input, data.output, data.drop_columns, data.rows is not None)


@lru_cache(maxsize=16)
def _mapping(input_: str | None, output: str | None, ignore: tuple[str, ...], in_document: bool) -> Mapping | None:
    if input_ is None or output is None:
        for field_name, given, other in (("input", input_, "output"), ("output", output, "input")):
            if given is not None and _is_template(given):
                what = f"data.{field_name} is a template, and there is no data.{other}"
                raise UserError(what, where=_where(other), fix="Give both: a template, or the name of a key.")
        return None
    if input_ == output:
        raise UserError(f'"{input_}" cannot be input and output at once', where=_where("output"))
    sides = [_side(name, text, in_document) for name, text in (("input", input_), ("output", output))]
    for side in sides:
        left_out = [key for key in side.keys if key in ignore]
        if left_out:
            what = f'{side.field} uses the key "{left_out[0]}", which data.drop_columns leaves out'
            raise UserError(
                what, where="data.drop_columns", fix="Take it out of data.drop_columns, or out of the template."
            )
    return Mapping(*sides)


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _where(name: str) -> str:
    return f"data.{name} (--{name})"


def _side(name: str, text: str, in_document: bool) -> Side:
    if not _is_template(text):
        return Side(f"data.{name}", text, None, (text,))
    try:
        tree = _ENVIRONMENT.parse(text)
        template = _ENVIRONMENT.from_string(text)
        names = meta.find_undeclared_variables(tree)
    except (TemplateSyntaxError, SyntaxError) as error:
        reason = error.message if isinstance(error, TemplateSyntaxError) else error.msg
        what = f"not a template that can be read: line {error.lineno}: {reason}"
        raise UserError(what, where=_where(name), fix=_HELP) from None
    except RecursionError:
        raise UserError("not a template that can be read: nested too deep", where=_where(name), fix=_HELP) from None
    if any(True for _ in meta.find_referenced_templates(tree)):
        raise UserError("a template that takes in another one, which is not to be had", where=_where(name), fix=_HELP)
    if _ABOVE in names and not in_document:
        what = "the template uses above, the keys above a row in its document, and there is no data.rows"
        raise UserError(what, where=_where(name), fix="Say where the rows are in the document: data.rows (--rows).")
    picked = [
        each.arg.value
        for each in tree.find_all(nodes.Getitem)
        if _is_row(each.node) and isinstance(each.arg, nodes.Const) and isinstance(each.arg.value, str)
    ]
    whole = sum(map(_is_row, tree.find_all(nodes.Name))) > len(picked)
    outside = {_ABOVE, PARENT} if in_document else {_ABOVE}
    keys = dict.fromkeys([*_in_order(tree, names - outside - {_ROW}), *picked])
    return Side(f"data.{name}", text, template, tuple(keys), whole, tuple(sorted(outside & names)))


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _ROW and node.ctx == "load"


def _in_order(tree: nodes.Template, names: set[str]) -> list[str]:
    return [node.name for node in tree.find_all(nodes.Name) if node.name in names]


_HELP = (
    "Templates are Jinja's over the row's keys, such as {{ question }} or {{ row[\"my column\"] }}: docs/formats.md."
)


def _text(value: Any) -> Any:
    """What an expression writes; a value without one plain spelling is the row's fault, not "None" in an answer."""
    if isinstance(value, Undefined) or (isinstance(value, _PLAIN) and not isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError("E305", f"{value} is not text")
        return value
    kind = "null" if value is None else type(value).__name__
    raise RowError("E305", f"a value of the template is {kind}, not text; tojson, join or default can write it")


def _tojson(value: Any, indent: int | None = None) -> str:
    """JSON as an answer has it: UTF-8, keys in the row's order, nothing escaped for HTML."""
    if isinstance(value, Undefined):
        str(value)  # raises what is undefined
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_text
    )
    environment.filters["tojson"] = _tojson
    # What comes out otherwise at each call would make another example of the same row.
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


_ENVIRONMENT = _environment()
