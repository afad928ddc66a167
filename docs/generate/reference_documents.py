"""The reference of the Python API, of JSON documents on disk and of row errors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from reference_sources import API, DOCUMENTS, OPTIONS, ROW_ERRORS, Option


def pages() -> dict[str, str]:
    """Return the pages, and the JSON Schemas beside them, by their path in the site."""
    written = {"reference/python.md": _python(), "reference/schemas.md": _schemas(), "reference/row-errors.md": _rows()}
    for name, (model, _place) in DOCUMENTS.items():
        written[f"reference/schemas/{name}.json"] = json.dumps(schema(model), indent=2) + "\n"
    return written


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a document's JSON Schema, as it lies on disk."""
    return model.model_json_schema(mode="validation")


def _python() -> str:
    out = [
        "# Python API\n",
        "Every command has a method of the same name on what `tunewright.open()` returns: `tunewright data add` is "
        "`project.data.add`. Tenants, their keys and the audit log are in the serving state, which you open: "
        "`with project.state() as state: state.tenants.list()`. Importing `tunewright` does not import torch.\n",
        "A function below that begins with `project` is a method with the project filled in: `verdict(project)` is "
        "`project.verdict()`.\n",
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
        "::: tunewright.open\n    options:\n      heading_level: 3\n",
    ]
    for title, members in API.items():
        out.append(f"## {title}\n")
        for each in members:
            out.append(f"::: {each.__module__}.{each.__qualname__}\n    options:\n      heading_level: 3\n")
            out += _options(each) if each in OPTIONS else []
    return "\n".join(out)


def _options(of: Any) -> list[str]:
    """Return the table of an options class's fields."""
    hints = get_type_hints(of, include_extras=True)
    rows = []
    for field in dataclasses.fields(of):
        about = next((each for each in get_args(hints[field.name]) if isinstance(each, Option)), None)
        if about is not None:
            rows.append(f"| `{field.name}` | {_cell(about.help)} | {_cell(about.default or str(field.default))} |")
    return ["| field | meaning | default |", "| --- | --- | --- |", *rows, ""]


def _schemas() -> str:
    out = [
        "# JSON schemas\n",
        "JSON Schemas of the documents that tunewright writes and reads, generated from the models that validate "
        "them. [Files of a project](files.md) lists everything else on disk.\n",
        "| document | schema |",
        "| --- | --- |",
        *(f"| {place} | [`{name}.json`](schemas/{name}.json) |" for name, (_model, place) in DOCUMENTS.items()),
        "",
        "To check `tunewright.yaml` while you type, write its schema beside it and name it in the first line:\n",
        "```bash",
        "tunewright config schema > tunewright.schema.json",
        "sed -i '1i # yaml-language-server: $schema=tunewright.schema.json' tunewright.yaml",
        "```\n",
    ]
    for name, (model, place) in DOCUMENTS.items():
        document = schema(model)
        out += [f"## {name.replace('-', ' ').capitalize()} {{ #{name} }}\n", f"{place}\n"]
        out += ["| field | type | meaning |", "| --- | --- | --- |"]
        out += [
            f"| `{field}`{'' if field in document.get('required', ()) else ' (optional)'} | {_kind(about)} | "
            f"{_cell(about.get('description', ''))} |"
            for field, about in document["properties"].items()
        ]
        out += ["", f"[Download the schema](schemas/{name}.json)\n"]
    return "\n".join(out)


def _rows() -> str:
    return "\n".join(
        [
            "# Row errors\n",
            "`tunewright data check` and `data add` name every row that they refuse, with a code. The meaning of a "
            "code never changes.\n",
            "| code | what is wrong | what to do |",
            "| --- | --- | --- |",
            *(f"| `{code}` | {_cell(wrong)} | {_cell(fix)} |" for code, (wrong, fix) in ROW_ERRORS.items()),
            "",
        ]
    )


def _kind(about: dict[str, Any]) -> str:
    """Return a JSON Schema's type in words."""
    if "const" in about:
        return f"`{json.dumps(about['const'])}`"
    if "enum" in about:
        return ", ".join(f"`{each}`" for each in about["enum"])
    if "$ref" in about:
        return str(about["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in about:
            return " or ".join(dict.fromkeys(_kind(each) for each in about[several]))
    kind = about.get("type", "any")
    if kind == "array":
        items = about.get("items") or {}
        return f"list of {_kind(items)}" if items else "list"
    return {"object": "mapping", "string": "text", "number": "number", "integer": "integer"}.get(kind, str(kind))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
