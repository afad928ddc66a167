"""The reference of the Python API: signatures, docstrings and fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from reference_cli import cell
from reference_sources import API, GROUPS, OPTIONS, Option

import tunewright

_ROLE = re.compile(r":\w+:`~?([^`]+)`|``([^`]+)``")
_PART = re.compile(r"^(Args|Returns|Raises|Yields):\n", re.MULTILINE)


def pages() -> dict[str, str]:
    """Return the reference's page by its path in docs/."""
    names = {
        function: f"{group}.{name}"
        for group, of in GROUPS.items()
        for name, function in methods(of)
        if callable(function)
    }
    out = [
        "# Python API\n",
        "Every command has a method of the same name on what `tunewright.open()` returns: `tunewright data add` is "
        "`project.data.add`. Tenants, their keys and the audit log are in the serving state, which you open: "
        "`with project.state() as state: state.tenants.list()`. Importing `tunewright` does not import torch.\n",
        "```python",
        "import tunewright",
        "",
        'project = tunewright.open("my-model")',
        'project.data.add(["pairs.jsonl"])',
        "adapter = project.train().adapter",
        "evaluated = project.evaluate(adapter.name)",
        "print(project.verdict(evaluated.folder).decision)",
        "```\n",
        "## Opening a project\n",
        *_function("tunewright.open", tunewright.open, "###"),
    ]
    for title, members in API.items():
        out.append(f"## {title}\n")
        for each in members:
            out += _class(each) if inspect.isclass(each) else _function(names[each], each, "###")
    return {"reference/python.md": "\n".join(out)}


def methods(of: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class, with their names."""
    for name, each in vars(of).items():
        if not name.startswith("_") and (inspect.isroutine(each) or isinstance(each, property)):
            yield name, each


def signature(function: Any) -> str:
    """Return a signature as it is written, without what a method is called on; `...` is a default of another kind."""
    found = inspect.signature(getattr(function, "__func__", function))
    parameters = list(found.parameters.values())
    if parameters and parameters[0].name in {"self", "cls", "project"}:
        del parameters[0]
    for place, each in enumerate(parameters):
        plain = each.default in (each.empty, None) or isinstance(each.default, int | float | str)
        default = each.default if plain else _Written("...")
        parameters[place] = each.replace(default=default, annotation=_Written(each.annotation))
    return str(found.replace(parameters=parameters, return_annotation=_Written(found.return_annotation)))


class _Written(str):
    """A text that is shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _function(name: str, function: Any, level: str) -> list[str]:
    call = f"{name.rpartition('.')[2]}{signature(function)}"
    if len(call) > 88:
        parts = re.split(r", (?=\*|\w+: )", call[call.index("(") + 1 : call.rindex(")")])
        inside = "".join(f"    {part},\n" for part in parts)
        call = f"{call[: call.index('(')]}(\n{inside}){call[call.rindex(')') + 1 :]}"
    return [f"{level} `{name}()`\n", f"```python\n{call}\n```\n", _prose(function)]


def _class(of: type) -> list[str]:
    out = [f"### `{of.__name__}`\n", _prose(of)]
    if of in OPTIONS:
        out += _options(of)
    elif rows := list(_fields(of)):
        out += ["| field | type | meaning |", "| --- | --- | --- |", *rows, ""]
    for name, each in methods(of) if of not in GROUPS.values() else ():
        if isinstance(each, property):
            out += [f"#### `{of.__name__}.{name}`\n", _prose(each)]
        else:
            out += _function(f"{of.__name__}.{name}", each, "####")
    return out


def _prose(of: Any) -> str:
    """Return a docstring as Markdown: its parts as lists."""
    first, *parts = _PART.split(_ROLE.sub(lambda role: f"`{role[1] or role[2]}`", inspect.getdoc(of) or ""))
    out = [first.strip(), ""]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        lines = re.sub(r"\n {4,}", " ", textwrap.dedent(text).strip()).splitlines()
        out += [
            f"{title.replace('Args', 'Arguments')}:\n",
            *(re.sub(r"^(\*{0,2}\w+): ", r"- `\1`: ", line) for line in lines),
            "",
        ]
    return "\n".join(out)


def _options(of: Any) -> list[str]:
    """Return the table of an options class's fields."""
    hints = get_type_hints(of, include_extras=True)
    rows = []
    for field in dataclasses.fields(of):
        about = next((each for each in get_args(hints[field.name]) if isinstance(each, Option)), None)
        if about is not None:
            rows.append(f"| `{field.name}` | {cell(about.help)} | {cell(about.default or str(field.default))} |")
    return ["| field | meaning | default |", "| --- | --- | --- |", *rows, ""]


def plain(annotation: ast.expr) -> ast.expr:
    """Return an annotation without what `Annotated` adds."""
    match annotation:
        case ast.Subscript(value=ast.Name("Annotated"), slice=ast.Tuple([kind, *_])):
            return kind
    return annotation


def _fields(of: type) -> Iterator[str]:
    """Yield the rows of a table of a data class's or model's fields, with the text below each in the source."""
    if not (dataclasses.is_dataclass(of) or issubclass(of, BaseModel)):
        return
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    body = made.body if isinstance(made, ast.ClassDef) else []
    for place, each in enumerate(body):
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            name, below = ast.unparse(each.target), body[place + 1] if place + 1 < len(body) else None
            text = getattr(getattr(below, "value", None), "value", None) if isinstance(below, ast.Expr) else None
            described = of.model_fields[name].description if issubclass(of, BaseModel) else None
            meaning = _ROLE.sub(lambda role: f"`{role[1] or role[2]}`", str(described or text or ""))
            yield f"| `{name}` | `{cell(ast.unparse(plain(each.annotation)))}` | {cell(meaning)} |"
