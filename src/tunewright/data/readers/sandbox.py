"""Jinja templates over rows, bounded in memory and time: no file or network, and a budget for each row.

Each operation that makes or reads a value spends the value's size first, so nothing large is ever
started. Jinja's own sandbox bounds only ``range``.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from decimal import Decimal
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tunewright.data.readers.row_errors import RowError

MAX_SIZE = 1 << 20
"""Limit of one value: its characters and, at any depth, its items."""
MAX_WORK = 1 << 24
"""Limit of one rendered row: the total size of all values that its operations read and make."""
_MAX_BITS = 100_000  # limit of a whole number
_MAX_NUMBER = 10_000  # limit of an argument that sets a width or a count
_STEP = 16  # work of an operation besides the sizes of its values: an empty loop must also end

_PLAIN = (str, int, float, Decimal, datetime.date, datetime.time)
_STATEMENTS = (nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Assign, nodes.With)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        re.findall(
            r"\w+",
            "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower "
            "isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace "
            "rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill",
        )
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    float: frozenset(("is_integer",)),
    datetime.date: frozenset(("isoformat",)),
    datetime.time: frozenset(("isoformat",)),
}
_FILTERS_LEFT_OUT = ("format", "pprint", "random", "urlize", "xmlattr")
_WIDTHS = frozenset(("batch", "center", "indent", "ljust", "rjust", "round", "slice", "tojson", "wordwrap", "zfill"))
"""Filters and methods whose result can be larger by a factor given as an argument."""
_COMPARING = frozenset(("dictsort", "groupby", "max", "min", "sort", "unique"))


_LEFT: ContextVar[int] = ContextVar("work left for the row that is rendered")


def _limit_error(reason: str) -> RowError:
    return RowError("E207", f"the template {reason}")


def render(template: Template, values: Mapping[str, Any]) -> str:
    """Return the text of a template of ``parse_template``; exceeding a limit is a RowError."""
    token = _LEFT.set(MAX_WORK)
    try:
        pieces, length = [], 0
        for piece in template.generate(values):
            length += len(piece)
            _spend(len(piece))
            _require_size(length)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _LEFT.reset(token)


def parse_template(text: str) -> tuple[nodes.Template, Template]:
    """Return the tree as written, and the template that spends its row's budget."""
    tree = _ENVIRONMENT.parse(text)
    for node in tree.find_all(nodes.Stmt):
        if not isinstance(node, _STATEMENTS) or (isinstance(node, nodes.For) and node.recursive):
            name = "recursive loops" if isinstance(node, nodes.For) else f"{type(node).__name__} statements"
            raise TemplateSyntaxError(f"{name} are not supported", node.lineno)
    return tree, _ENVIRONMENT.from_string(_Spending().visit(_ENVIRONMENT.parse(text)))


class _Spending(NodeTransformer):
    """Passes each value that Jinja's compiled code would read unchecked through a filter that spends its size."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        first, *rest = (_through(part, "string") for part in node.nodes)
        joined: nodes.Expr = first
        for part in rest:
            joined = nodes.Add(joined, part, lineno=node.lineno)
        return joined

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through(node.expr)
        for operand in node.ops:
            operand.expr = _through(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through(node.node)
        return node

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through(node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


def _through(node: nodes.Node, name: str = "_spend_value") -> nodes.Expr:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _spend(work: int) -> None:
    left = _LEFT.get() - work - _STEP
    _LEFT.set(left)
    if left < 0:
        raise _limit_error(f"takes too many steps (limit {MAX_WORK:,})")


def _require_size(size: int) -> None:
    if size > MAX_SIZE:
        raise _limit_error(f"makes a value of more than {MAX_SIZE:,} characters and items")


def _size(value: Any) -> int:
    """Return the characters and items of a value, counting repeated items each time."""
    size, left = 0, [value]
    while left:
        inner = left.pop()
        size += 1
        kind = type(inner)
        if kind is str:
            size += len(inner)
        elif kind is list or kind is tuple:
            left += inner
        elif kind is Namespace:
            left += object.__getattribute__(inner, "_Namespace__attrs").values()
        elif kind is dict:
            left += inner.keys()
            left += inner.values()
        elif isinstance(inner, str | bytes | range):
            size += len(inner)
        elif isinstance(inner, int):
            size += inner.bit_length() >> 3
            if inner.bit_length() > _MAX_BITS:
                raise _limit_error(f"makes a number of more than {_MAX_BITS:,} bits")
        elif isinstance(inner, Mapping):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, Iterable) and not isinstance(inner, Iterator | Undefined):
            left += inner
        _require_size(size + len(left))
    return size


def _spend_value(value: Any) -> Any:
    _spend(_size(value))
    return value


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(0)
        yield value


def _spend_call(name: str, value: Any, arguments: list[Any]) -> None:
    """Spend the cost of a filter, test or method before it is called."""
    own, others = _size(value), sum(map(_size, arguments))
    made = 0  # upper limit, besides a copy of the value
    if name in _WIDTHS:
        numbers = [abs(each) for each in arguments if isinstance(each, int)]
        if any(number > _MAX_NUMBER for number in numbers):
            raise _limit_error(f"has a number over {_MAX_NUMBER:,} in {name}")
        lines = value.count("\n") + 1 if isinstance(value, str) and name != "wordwrap" else own
        made = lines * (sum(numbers) + others)
    elif name == "replace" and len(arguments) >= 2 and all(isinstance(each, str) for each in (value, *arguments[:2])):
        made = value.count(arguments[0]) * len(arguments[1])
    elif name == "join":
        # A method has the separator as its value, a filter as its argument.
        separators, items = (own, others) if isinstance(value, str) and arguments else (others, own)
        made = separators * items
    elif name == "sum" and any(not isinstance(each, int | float | str | None) for each in arguments):
        raise _limit_error("adds up lists in sum")
    elif name in _COMPARING:
        own *= _STEP
    if made:
        _require_size(own + made)
    _spend(own + made + others)


def _spending(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or test that spends its row's budget."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def spending(*arguments: Any, **named: Any) -> Any:
        value, *others = arguments[skipped:]
        if isinstance(value, Iterator) and name in ("join", "sum", *_WIDTHS, *_COMPARING):
            value = list(_each(value))
        _spend_call(name, value, [*others, *named.values()])
        result = function(*arguments[:skipped], value, *others, **named)
        _size(result)
        return result

    return spending


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        known = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        builtin = known is not None or isinstance(obj, int | bytes | Decimal)
        return not builtin or not callable(value) or attr in (known or ())

    def wrap_str_format(self, value: Any) -> None:
        """Wrap nothing: Jinja would allow ``str.format`` in a form that checks attributes, but not widths."""

    def call(__self, __context: Context, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, tuple(_METHODS)):
            _spend_call(__obj.__name__, owner, [*arguments, *named.values()])
        else:
            _spend(sum(map(_size, (*arguments, *named.values()))))
        result = super().call(__context, __obj, *arguments, **named)
        _size(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = _size(left) + _size(right)
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("formatting with % is not supported (use ~)")
        if operator == "**" and whole and right > 0 and left.bit_length() * right > _MAX_BITS:
            raise _limit_error(f"makes a number of more than {_MAX_BITS:,} bits")
        if operator == "*" and not whole:
            count = next((each for each in (left, right) if isinstance(each, int)), 1)
            sizes = _size(right if isinstance(left, int) else left) * max(count, 1)
        _require_size(sizes)
        _spend(sizes)
        result = super().call_binop(context, operator, left, right)
        _size(result)
        return result


@pass_context  # so that nothing is computed when the template is compiled, outside of any row's budget
def _finalize(_context: Context, value: Any) -> Any:
    """Return the value of an expression; a value without a plain text form is a fault, not "None" in an answer."""
    if isinstance(value, Undefined) or (isinstance(value, _PLAIN) and not isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError("E305", f"{value} is not text")
        return value
    kind = "null" if value is None else type(value).__name__
    raise RowError("E305", f"a value of the template is {kind}, not text (use tojson, join or default)")


def _tojson(value: Any, indent: int | None = None) -> str:
    """Return JSON for an answer: not ASCII-escaped, keys in the row's order, no escaping for HTML."""
    if isinstance(value, Undefined):
        str(value)  # raises UndefinedError
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_finalize, optimized=False
    )
    # Results that change with each call would make different examples of the same row.
    for name in _FILTERS_LEFT_OUT:
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _spending(name, filter_) for name, filter_ in environment.filters.items()}
    environment.filters |= {"_spend_value": _spend_value, "_each": _each}
    tests: Mapping[str, Any] = environment.tests
    environment.tests = {name: _spending(name, test) for name, test in tests.items()}
    return environment


_ENVIRONMENT = _environment()
