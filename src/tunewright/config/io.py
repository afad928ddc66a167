"""Reading ``tunewright.yaml`` with line numbers, writing it with comments, and changing values in place."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunewright.config import Config, DataConfig, EvaluateConfig, TrainConfig
from tunewright.config.metrics import PlainMetric
from tunewright.core.errors import UserError
from tunewright.core.io import write_text

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_DIGITS = 400
"""Maximum digits of a number, enough for any float: Python converts some notations in quadratic time."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_Location = tuple[str | int, ...]


def load_config(path: Path) -> Config:
    """Read and validate a config; an error names its file, line and key."""
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
        values = yaml.load(text, Loader=_Loader)
    except _InvalidScalarError as error:
        raise UserError(f"Invalid value: {error}", where=f"{path}:{error.line}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", error))
        fix = "Use spaces instead of tabs." if "'\\t'" in problem else None
        raise UserError(f"Not valid YAML: {problem}", where=where, fix=fix) from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # PyYAML takes any digits in an escape or in a directive
        raise UserError(f"Not valid YAML: {error}", where=str(path)) from None
    if not isinstance(values, dict | None):
        raise UserError("The config must be a mapping of keys to values", where=f"{path}:1")
    try:
        return Config.model_validate(_without_empty_sections(values or {}))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), lines, path) from None


def parse_value(text: str) -> Any:
    """Return the value of a YAML text, such as ``{choices: [a, b]}``; raise a ValueError that says what is wrong."""
    try:
        _require_bounded(text, Path("the value"))
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"Not valid YAML: {getattr(error, 'problem', error)}") from None
    except (_InvalidScalarError, UserError) as error:
        raise ValueError(f"Invalid value: {error}") from None


def _require_bounded(text: str, path: Path) -> None:
    """Refuse constructs that expand a short text to a large or endless value, before PyYAML builds it."""
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
    """Return the section that these keys lead to, even if it is optional or one of several types."""
    sections: list[type[BaseModel]] = [Config]
    for key in parents:
        if key.isdigit():  # an index of a list
            continue
        fields = [f for section in sections for name, f in section.model_fields.items() if key in {name, f.alias}]
        sections = [section for field in fields for section in _models(field.annotation)]
    return sections[0] if sections else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation allows, including sections in options, unions and lists."""
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


class _InvalidScalarError(Exception):
    """A scalar that looks like or is tagged as a number or date and is invalid; ``line`` counts from 1."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Loads YAML; errors name the line of an invalid scalar."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            # PyYAML matches `!!timestamp` without looking at the match, and looks `!!bool` up in a table.
            kind = "date" if isinstance(error, AttributeError) else node.tag.rpartition(":")[2]
            reason = str(error) if isinstance(error, ValueError) else f"not a valid {kind}"
            raise _InvalidScalarError(reason, node.start_mark.line + 1) from None


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
        *parents, unknown = map(str, location)
        section = _model_at(parents)
        known = [field.alias or name for name, field in section.model_fields.items()] if section else []
        # Part of a key's name (`base`) says more than similar letters (`advise`).
        nearest = [name for name in known if unknown in name.split("_")]
        nearest = nearest or difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {'.'.join([*parents, nearest[0]])}?" if nearest else f"valid keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [1, 2]")
    if not key:
        return message
    given = error["input"]
    allowed = re.findall("'([^']*)'", error.get("ctx", {}).get("expected", ""))
    if error["type"] == "metric":
        allowed = [*get_args(PlainMetric)]
    nearest = difflib.get_close_matches(given.lower(), allowed, n=1) if isinstance(given, str) else []
    hint = f": did you mean {nearest[0]}?" if nearest else ""
    return f"{key}: {message[0].lower()}{message[1:]}, got {given!r}{hint}"


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
        options = [option for option in get_args(field.annotation) if isinstance(option, str)]
        choices = f"  # {' | '.join(options)}" if options else ""
        out.append(f"{indent}{mark}{key}: {_yaml(values.get(key, default))}{choices}")
    return out


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style; floats without an exponent, which YAML 1.1 may read as text."""
    if isinstance(value, float) and 0 < value < 0.001:
        return f"{value:.12f}".rstrip("0")
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(value, BaseModel):
        plain = value.model_dump(exclude_unset=True)
    style = '"' if isinstance(value, str) and "\n" in value else None
    return (
        yaml.safe_dump(plain, default_flow_style=True, default_style=style, width=10_000_000, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def write_section(path: Path, wanted: TrainConfig | DataConfig | EvaluateConfig) -> dict[str, Any]:
    """Change the config's section of this type to ``wanted``, and return the changed keys with their new values.

    Comments, order and other keys survive. The YAML parser finds the places, and the result is parsed again
    before it is written. If a key cannot be changed in place, an error is raised and nothing is written.
    """
    mark, text = _marked_text(path)
    before = current = parse_config(text, path)
    section = next(name for name in Config.model_fields if _section(name) is type(wanted))
    written: dict[str, Any] = {}
    # The preset is the first key of its section, and sets the values that the file leaves out.
    for key in type(wanted).model_fields:
        value = getattr(wanted, key)
        if getattr(getattr(current, section), key) == value:
            continue
        edited = _edited(text, path, before, section, key, value)
        if edited is None:
            listed = ", ".join(f"{k}: {_yaml(v)}" for k, v in wanted if getattr(getattr(before, section), k) != v)
            raise UserError(
                f"{section}.{key} is written in a way that cannot be changed in place; nothing was changed",
                where=str(path),
                fix=f"Edit it yourself: {listed}",
            )
        (text, current), written[key] = edited, value
    assert current == before.model_copy(update={section: wanted})
    if written:
        write_text(path.resolve(), mark + text)
    return written


def set_keys(path: Path, values: Mapping[str, Any]) -> None:
    """Write these values by their dotted keys, such as ``train.epochs``; see :func:`with_keys`."""
    mark, text = _marked_text(path)
    write_text(path.resolve(), mark + with_keys(text, path, values))


def with_keys(text: str, path: Path, values: Mapping[str, Any]) -> str:
    """Return the config's text with these values in place; comments, order and all other keys stay.

    Raises:
        UserError: the text or a value is invalid, or a key is written in a way that cannot be changed in place.
    """
    parse_config(text, path)
    wanted = yaml.load(text, Loader=_Loader) or {}
    for dotted, value in values.items():
        section, _, key = dotted.rpartition(".")
        within = wanted
        if section:
            within = wanted[section] = wanted.get(section) or {}
        within[key] = value
        edited = _with_value(text, section, key, _yaml(value))
        try:
            changed = edited is not None and yaml.load(edited, Loader=_Loader) == wanted
        except yaml.YAMLError:
            changed = False
        if edited is None or not changed:
            what = f"{dotted} is written in a way that cannot be changed in place; nothing was changed"
            raise UserError(what, where=str(path), fix=f"Edit it yourself: {dotted}: {_yaml(value)}")
        text = edited
    parse_config(text, path)
    return text


def _marked_text(path: Path) -> tuple[str, str]:
    """Return a file's byte order mark, if it has one, and its text with its line ends."""
    raw = path.read_bytes()
    return ("\ufeff", raw[3:].decode()) if raw.startswith(b"\xef\xbb\xbf") else ("", raw.decode())


def _edited(text: str, path: Path, before: Config, section: str, key: str, value: Any) -> tuple[str, Config] | None:
    """Return the text with this value, and its config, if all other sections are unchanged."""
    edited = _with_value(text, section, key, _yaml(value))
    if edited is None:
        return None
    try:
        config = parse_config(edited, path)
    except UserError:
        return None
    others = config.model_copy(update={section: getattr(before, section)})
    return (edited, config) if others == before and getattr(getattr(config, section), key) == value else None


def _with_value(text: str, within: str, key: str, spelt: str) -> str | None:
    """Return the text with ``key`` of the section (empty: of the top level) set; None if impossible in place."""
    newline = "\r\n" if "\r\n" in text else "\n"
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    section = _pair(root, within or key)
    if not within and section is not None:
        return _replace(text, *section, spelt)
    if section is None:
        if isinstance(root, yaml.MappingNode) and root.flow_style:  # {name: a}
            return _into_flow(text, root, f"{within}: {{{key}: {spelt}}}" if within else f"{key}: {spelt}")
        ended = text if not text or text.endswith("\n") else text + newline
        lead = f"{within}:{newline}  " if within else ""
        return f"{ended}{lead}{key}: {spelt}{newline}"
    name, values = section
    if isinstance(values, yaml.ScalarNode):  # an empty section
        if values.value:
            return _replaced(text, values.start_mark.index, values.end_mark.index, f"{{{key}: {spelt}}}")
        return _after_line(text, name, f"  {key}: {spelt}", newline)
    there = _pair(values, key)
    if there is not None:
        return _replace(text, *there, spelt)
    assert isinstance(values, yaml.MappingNode)
    if values.flow_style:
        return _into_flow(text, values, f"{key}: {spelt}")
    # Right below the section's name: anywhere else it could come between a key and the comment above it.
    indent = " " * values.start_mark.column
    return _after_line(text, name, f"{indent}{key}: {spelt}", newline)


def _pair(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next(((name, value) for name, value in pairs if name.value == key), None)


def _replace(text: str, name: yaml.Node, value: yaml.Node, spelt: str) -> str | None:
    start, end = value.start_mark.index, value.end_mark.index
    between = text[name.end_mark.index : start]
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        # A list with a line for each item becomes a flow list behind the key.
        start, end = name.end_mark.index, value.value[-1].end_mark.index
        return None if "#" in text[start:end] else _replaced(text, start, end, f": {spelt}")
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        # A block's end is the start of what follows it, and a comment may stand on its first line.
        block = text[start:end]
        end -= len(block) - len(block.rstrip())
        if "#" in block.partition("\n")[0]:
            return None
    # Anything but a colon and spaces between them is a comment.
    return _replaced(text, start, end, spelt) if between.strip() == ":" else None


def _replaced(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def _into_flow(text: str, mapping: yaml.Node, pair: str) -> str:
    start = mapping.start_mark.index + 1
    return _replaced(text, start, start, f"{pair}, " if mapping.value else pair)


def _after_line(text: str, node: yaml.Node, line: str, newline: str) -> str:
    end = text.find("\n", node.end_mark.index)
    if end < 0:
        return f"{text}{newline}{line}{newline}"
    return _replaced(text, end + 1, end + 1, line + newline)
