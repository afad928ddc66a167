"""Reading ``tunewright.yaml`` with line numbers and writing it with comments."""

from __future__ import annotations

import difflib
import textwrap
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunewright.config import Config
from tunewright.core.errors import UserError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_DIGITS = 400
"""Of a number: Python converts some of YAML's notations in quadratic time. No finite float needs more."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_ENGINES = "start each engine with `tunewright engine serve` and list their addresses in serve.engines"
_REMOVED = {
    "serve.replicas": _ENGINES,
    "serve.max_replicas": f"{_ENGINES}; Kubernetes, KEDA or systemd start more of them",
    "serve.target_ttft_s": "scale engines by tunewright_queued_requests, as the chart's server.autoscaling does",
    "serve.adapters_per_replica": "an engine holds all released adapters; serve others by further gateways",
}

_Location = tuple[str | int, ...]


def load_config(path: Path) -> Config:
    """Read and validate a config.

    Raises:
        UserError: The file is not YAML, or has an unknown key or an invalid value; names file, line and key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"The config is larger than {_MAX_BYTES:,} bytes", where=str(path))
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            "No such file", where=str(path), fix="Run `tunewright init` to create one, or name the project's folder."
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"Not a UTF-8 text file ({error})", where=str(path)) from None
    return parse_config(text, path)


def parse_config(text: str, path: Path) -> Config:
    """Validate a config's text; raise the errors of :func:`load_config`, which name ``path``."""
    try:
        _require_bounded(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = {} if root is None else _lines(root, path)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"Not valid YAML: {getattr(error, 'problem', error)}", where=where) from None
    except UserError:
        raise
    except (ValueError, AttributeError) as error:  # a scalar that looks like or says that it is a number or date
        assert root is not None
        reason = error if isinstance(error, ValueError) else "not a date"
        raise UserError(f"Invalid value: {reason}", where=f"{path}:{_bad_scalar(root)}") from None
    if not isinstance(values, dict | None):
        raise UserError("The config must be a mapping of keys to values", where=f"{path}:1")
    try:
        return Config.model_validate(_without_empty_sections(values or {}))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), lines, path) from None


def _require_bounded(text: str, path: Path) -> None:
    """Refuse what makes a short text a large or endless value, before PyYAML builds any."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{path}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"Aliases are not supported: *{event.anchor}", where=where, fix="Write the value again.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UserError(f"Lists and mappings are nested too deep (limit {_MAX_DEPTH})", where=where)


def _without_empty_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Remove sections that are null because all their keys are commented out; they mean the defaults."""
    return {k: v for k, v in values.items() if not (v is None and _section(k) is not None)}


def _section(key: str) -> type[BaseModel] | None:
    field = Config.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _model_at(parents: list[str]) -> type[BaseModel] | None:
    """Return the section that these keys lead to, also where it is optional or one of several."""
    sections: list[type[BaseModel]] = [Config]
    for key in parents:
        if key.isdigit():  # an index of a list
            continue
        fields = [f for section in sections for name, f in section.model_fields.items() if key in {name, f.alias}]
        sections = [section for field in fields for section in _models(field.annotation)]
    return sections[0] if sections else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation allows, inside options, unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _lines(node: yaml.Node, path: Path, prefix: _Location = ()) -> dict[_Location, int]:
    """Return the line (from 1) of every key and list item."""
    lines: dict[_Location, int] = {}
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(
                    "A key must be a word, not a list or mapping", where=f"{path}:{key.start_mark.line + 1}"
                )
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    elif node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
        where = f"{path}:{node.start_mark.line + 1}"
        raise UserError(f"A number of {len(node.value):,} characters (limit {_MAX_DIGITS})", where=where)
    for name, marked, child in children:
        location = (*prefix, name)
        line = marked.start_mark.line + 1
        if location in lines:
            dotted = ".".join(map(str, location))
            raise UserError(
                f"Duplicate key {dotted}",
                where=f"{path}:{line}",
                fix=f"Remove it here or on line {lines[location]}.",
            )
        lines[location] = line
        lines |= _lines(child, path, location)
    return lines


def _bad_scalar(node: yaml.Node) -> int:
    """Return the line (from 1) of the first value that YAML's own types reject."""
    loader = yaml.SafeLoader("")
    if isinstance(node, yaml.ScalarNode):
        try:
            loader.construct_object(node)
        except (ValueError, AttributeError):  # PyYAML matches `!!timestamp` without looking at the match
            return node.start_mark.line + 1
        return 0
    children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    return next(filter(None, map(_bad_scalar, children)), 0)


def _explain(errors: list[ErrorDetails], lines: dict[_Location, int], path: Path) -> UserError:
    """Return one UserError for all errors, at the place of the first."""
    faults = [(_line(_keys(e["loc"]), lines), _fault(e)) for e in errors]
    where = f"{path}:{faults[0][0]}"
    if len(faults) == 1:
        return UserError(faults[0][1], where=where)
    listed = "\n".join(f"  {path}:{line}: {what}" for line, what in faults)
    return UserError(f"{len(faults)} errors\n{listed}", where=str(path))


def _keys(location: _Location) -> _Location:
    """Return an error's location as in the file; pydantic repeats the deciding key of a union."""
    return tuple(key for key, before in zip(location, ("", *location), strict=False) if key != before)


def _line(location: _Location, lines: dict[_Location, int]) -> int:
    while location:
        if location in lines:
            return lines[location]
        location = location[:-1]
    return 1


def _fault(error: ErrorDetails) -> str:
    location = _keys(error["loc"])
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        if key in _REMOVED:
            return f"{key} was removed: {_REMOVED[key]}"
        *parents, unknown = map(str, location)
        section = _model_at(parents)
        known = [field.alias or name for name, field in section.model_fields.items()] if section else []
        # Part of a key's name (`base`) says more than similar letters (`advise`).
        nearest = [name for name in known if unknown in name.split("_")]
        nearest = nearest or difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {'.'.join([*parents, nearest[0]])}?" if nearest else f"valid keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [1, 2]")
    return f"{key}: {message[0].lower()}{message[1:]}, got {error['input']!r}" if key else message


def write_config(values: dict[str, Any]) -> str:
    """Return a commented ``tunewright.yaml``: keys in ``values`` (by section) are set, all others show their defaults.

    The comments are the schema's descriptions, so that file and schema cannot drift apart.
    """
    out = ["# tunewright.yaml: everything that decides a result. A commented key shows its default.", ""]
    out += _section_lines(Config, values, "")
    text = "\n".join(out) + "\n"
    Config.model_validate(_without_empty_sections(yaml.safe_load(text)))
    return text


def _section_lines(model: type[BaseModel], values: dict[str, Any], indent: str) -> list[str]:
    out = []
    for name, field in model.model_fields.items():
        nested = _section(name) if model is Config else None
        if nested is not None:
            doc = (nested.__doc__ or "").strip()
            out += ["", f"# {doc}", f"{name}:", *_section_lines(nested, values.get(name, {}), "  ")]
            continue
        lines = textwrap.wrap(field.description or "", 100 - len(indent), break_on_hyphens=False)
        out += [f"{indent}# {line}" for line in lines]
        key, default = field.alias or name, field.get_default()
        mark = "" if key in values else "#"
        out.append(f"{indent}{mark}{key}: {_yaml(values.get(key, default))}{_choices(field.annotation)}")
    return out


def _yaml(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 0.001:
        return f"{value:.10f}".rstrip("0")
    plain = list(value) if isinstance(value, tuple) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )


def _choices(annotation: Any) -> str:
    options = [a for a in get_args(annotation) if isinstance(a, str)]
    return f"  # {' | '.join(options)}" if options else ""
