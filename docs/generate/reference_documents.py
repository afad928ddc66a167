"""The reference of JSON documents on disk and of row errors."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from reference_cli import cell
from reference_sources import DOCUMENTS, ROW_ERRORS


def pages() -> dict[str, str]:
    """Return the pages by their path in docs/."""
    return {"reference/schemas.md": _schemas(), "reference/row-errors.md": _rows()}


def schemas() -> dict[str, str]:
    """Return the JSON Schemas by their path in the site."""
    written = {name: json.dumps(schema(model), indent=2) + "\n" for name, (model, _place) in DOCUMENTS.items()}
    return {f"reference/schemas/{name}.json": text for name, text in written.items()}


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a document's JSON Schema, as it lies on disk."""
    return model.model_json_schema(mode="validation")


def _schemas() -> str:
    out = [
        "# JSON schemas\n",
        "JSON Schemas of the documents that tunewright writes and reads, generated from the models that validate "
        "them. The documentation site has the schemas as files next to this page. [Files of a project](files.md) lists "
        "everything else on disk.\n",
        "| document | schema |",
        "| --- | --- |",
        *(f"| {place} | `schemas/{name}.json` |" for name, (_model, place) in DOCUMENTS.items()),
        "",
        "To check `tunewright.yaml` while you type, write its schema next to it and name it in the first line:\n",
        "```bash",
        "tunewright config schema > tunewright.schema.json",
        "sed -i '1i # yaml-language-server: $schema=tunewright.schema.json' tunewright.yaml",
        "```\n",
    ]
    for name, (model, place) in DOCUMENTS.items():
        document = schema(model)
        out += [f"## {name.replace('-', ' ').capitalize()}\n", f"{place}\n"]
        out += ["| field | type | meaning |", "| --- | --- | --- |"]
        out += [
            f"| `{field}`{'' if field in document.get('required', ()) else ' (optional)'} | {_kind(about)} | "
            f"{cell(about.get('description', ''))} |"
            for field, about in document["properties"].items()
        ]
        out += [""]
    return "\n".join(out)


def _rows() -> str:
    return "\n".join(
        [
            "# Row errors\n",
            "`tunewright data check` and `data add` name every row that they refuse, with a code. The meaning of a "
            "code never changes.\n",
            "| code | what is wrong | what to do |",
            "| --- | --- | --- |",
            *(f"| `{code}` | {cell(wrong)} | {cell(fix)} |" for code, (wrong, fix) in ROW_ERRORS.items()),
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
