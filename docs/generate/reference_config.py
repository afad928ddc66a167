"""The configuration reference: every key of ``tunewright.yaml``, from the models that validate it."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from reference_sources import Config

EXAMPLES: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("examples.yaml").read_text(encoding="utf-8")
)
_SOURCE = re.compile(r" ?\(([^():]+): ((?:[^()]|\([^()]*\))+)\)")
_BOUNDS = (
    (annotated_types.Ge, "ge", "at least {}"),
    (annotated_types.Gt, "gt", "over {}"),
    (annotated_types.Le, "le", "at most {}"),
    (annotated_types.Lt, "lt", "under {}"),
)


@dataclass(frozen=True)
class Key:
    """A key of the configuration, by its path from the top."""

    path: tuple[str, ...]
    field: FieldInfo
    model: type[BaseModel]

    @property
    def name(self) -> str:
        """Return the path with dots."""
        return ".".join(self.path)

    @property
    def default(self) -> Any:
        """Return the default, or pydantic's mark for a key that has to be given."""
        return self.field.get_default(call_default_factory=True)

    @property
    def meaning(self) -> str:
        """Return the description without the default's source."""
        found = self._cited
        return " ".join((self._text.replace(found[0], "") if found else self._text).split())

    @property
    def source(self) -> str:
        """Return where the default comes from; empty where the description names no source."""
        extra = self.field.json_schema_extra
        if isinstance(extra, dict) and "source" in extra:
            return str(extra["source"])
        return self._cited[2] if self._cited and self.default is not None else ""

    @property
    def null_means(self) -> str:
        """Return what happens by default, for a key whose default is null."""
        return self._cited[2] if self._cited and self.default is None else ""

    @property
    def _text(self) -> str:
        """Return the description on one line."""
        return " ".join((self.field.description or "").split())

    @property
    def _cited(self) -> re.Match[str] | None:
        """Find the ``(DEFAULT: SOURCE)`` of the description."""
        for found in _SOURCE.finditer(self._text):
            if _same(found[1], self.default):
                return found
        return None

    @property
    def example(self) -> dict[str, Any]:
        """Return a configuration that sets this key."""
        if self.name in EXAMPLES:
            return EXAMPLES[self.name]
        value = _example(self)
        for part in reversed(self.path):
            value = {part: value}
        return dict(value)


def keys(config: type[BaseModel] = Config) -> list[Key]:
    """Return every key that takes a value, in the order of the models."""
    return list(_walk(config, ()))


def pages() -> dict[str, str]:
    """Return the reference's page by its path in the site."""
    everything = keys()
    sections = {name: model for name, field in Config.model_fields.items() if (model := _section(field)) is not None}
    out = [
        "# Configuration\n",
        "`tunewright.yaml` holds every setting that decides a result. `tunewright init` writes one with all keys "
        "commented out, and an unknown key is an error that names the nearest known one. A key that is left out has "
        "its default.\n",
        "*Source* names the paper, model or tool that a default comes from.\n",
    ]
    top = [key for key in everything if len(key.path) == 1]
    out += ["## Top level\n", _overview(top), *map(_entry, top)]
    for name, model in sections.items():
        inside = [key for key in everything if key.path[0] == name]
        out += [f"## `{name}`\n", f"{' '.join((model.__doc__ or '').split())}\n", _overview(inside)]
        out += map(_entry, inside)
    return {"reference/config.md": "\n".join(out)}


def _walk(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        nested = _section(field)
        if nested is None:
            yield Key(here, field, model)
            nested = _optional_section(field.annotation)
        if nested is not None:
            yield from _walk(nested, here)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _optional_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section of a key that is either a section or null."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in {Union, types.UnionType} and len(parts) == 1:
        kind = parts[0]
        return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return None


def _overview(inside: list[Key]) -> str:
    rows = [f"| [`{key.path[-1] if len(key.path) < 3 else '.'.join(key.path[1:])}`](#{key.name.replace('.', '')}) "
            f"| {kind(key)} | {default(key)} |" for key in inside]  # fmt: skip
    return "\n".join(["| key | type | default |", "| --- | --- | --- |", *rows, ""])


def _entry(key: Key) -> str:
    shown = default(key) or "none: it has to be given"
    facts = [f"**Type:** {kind(key)}", f"**Default:** {shown}{f': {key.null_means}' if key.null_means else ''}"]
    if key.source:
        facts.append(f"**Source:** {key.source}")
    example = yaml.safe_dump(plain(key.example), sort_keys=False, allow_unicode=True, width=90).rstrip()
    return "\n".join(
        [
            f"### `{key.name}`\n",
            f"{_text(key.meaning)}\n",
            *(f"- {fact}" for fact in facts),
            "",
            f"```yaml\n{example}\n```\n",
        ]
    )


def _text(meaning: str) -> str:
    """Return a description in which braces and brackets stand as they are written."""
    return re.sub(r"(?<!`)(\{[^`{}]*(?:\{[^{}]*\}[^{}]*)*\})(?!`)", r"`\1`", meaning).replace("<", "&lt;")


def default(key: Key) -> str:
    if key.default is PydanticUndefined:
        return ""
    return f"`{_inline(key.default)}`"


def plain(value: Any) -> Any:
    """Return a value in YAML's own types."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def _inline(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 0.001:
        return f"{value:.10f}".rstrip("0")
    text = yaml.safe_dump(plain(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _same(written: str, default: Any) -> bool:
    """Compare the text before a source with the default."""
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        return False
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return bool(value == str(default))
    return bool(value == plain(default)) or str(value) == str(default)


def kind(key: Key) -> str:
    return described(key.field.annotation, tuple(key.field.metadata))


def described(annotation: Any, metadata: tuple[Any, ...]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(parts[0], tuple(parts[1:]) + metadata)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in {Union, types.UnionType}:
        named = [described(part, metadata if part is not type(None) else ()) for part in parts]
        return " or ".join(dict.fromkeys(part for part in named))
    if origin is tuple or origin is list:
        return f"list of {described(parts[0], ())}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = [field.alias or name for name, field in annotation.model_fields.items()]
        return f"mapping ({', '.join(f'`{name}`' for name in fields)})"
    name = {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "null"}.get(annotation)
    bounds = [
        form.format(_inline(limit))
        for kind, attribute, form in _BOUNDS
        for each in metadata
        if isinstance(each, kind) and (limit := getattr(each, attribute)) is not None
    ]
    return ", ".join([name or str(getattr(annotation, "__name__", annotation)), *bounds])


def _example(key: Key) -> Any:
    """Return a value that differs from the default where the type says what else there is, else the default."""
    annotation = key.field.annotation
    choices = [choice for choice in _literals(annotation) if choice != key.default]
    listed = get_origin(annotation) in {tuple, list}
    if choices:
        return [choices[0]] if listed else choices[0]
    if key.default is not PydanticUndefined and key.default not in (None, (), {}):
        return not key.default if isinstance(key.default, bool) else key.default
    return key.default


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if isinstance(annotation, type):
        return []
    return [choice for part in get_args(annotation) for choice in _literals(part)]
