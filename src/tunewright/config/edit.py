"""Changing values of ``tunewright.yaml`` in place: every other byte of the file stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tunewright.config import Config, DataConfig, TrainConfig
from tunewright.config.io import parse_config
from tunewright.core.errors import UserError
from tunewright.core.io import write_text


def write_section(path: Path, wanted: TrainConfig | DataConfig) -> dict[str, Any]:
    """Change the config's section of this type to ``wanted``, key by key; comments, order and other keys survive.

    The YAML parser finds the places, and the result is parsed again before it is written.

    Returns:
        The keys that were changed, with their new values.

    Raises:
        UserError: The config cannot be read, or a key is written in a way that cannot be changed in place.
    """
    raw = path.read_bytes()
    mark, text = ("\ufeff", raw[3:].decode()) if raw.startswith(b"\xef\xbb\xbf") else ("", raw.decode())
    before = parse_config(text, path)
    section = "train" if isinstance(wanted, TrainConfig) else "data"
    written: dict[str, Any] = {}
    # The preset is the first key of its section, and sets the values that the file leaves out.
    for key in type(wanted).model_fields:
        value = getattr(wanted, key)
        if getattr(getattr(parse_config(text, path), section), key) != value:
            edited = _with_value(text, section, key, _spelt(value))
            if edited is None or not _is(edited, path, before, section, key, value):
                differing = {k: v for k, v in wanted if getattr(getattr(before, section), k) != v}
                listed = ", ".join(f"{k}: {_spelt(v)}" for k, v in differing.items())
                raise UserError(
                    f"{section}.{key} is written in a way that cannot be changed in place; nothing was changed",
                    where=str(path),
                    fix=f"Edit it yourself: {listed}",
                )
            text, written[key] = edited, value
    assert parse_config(text, path) == before.model_copy(update={section: wanted})
    if written:
        write_text(path.resolve(), mark + text)
    return written


def _is(text: str, path: Path, before: Config, section: str, key: str, value: Any) -> bool:
    """Return whether an edited text is a config with this value and all other sections unchanged."""
    try:
        config = parse_config(text, path)
    except UserError:
        return False
    others = config.model_copy(update={section: getattr(before, section)})
    return others == before and getattr(getattr(config, section), key) == value


def _spelt(value: Any) -> str:
    """Return a value in YAML's flow style; floats without an exponent, which YAML 1.1 may read as text."""
    if isinstance(value, float):
        return f"{value:.12f}".rstrip("0").removesuffix(".")
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _with_value(text: str, within: str, key: str, spelt: str) -> str | None:
    """Return the text with ``key`` of the section set; None where that is impossible in place."""
    newline = "\r\n" if "\r\n" in text else "\n"
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    section = _pair(root, within)
    if section is None:
        if isinstance(root, yaml.MappingNode) and root.flow_style:  # {name: a}
            return _into_flow(text, root, f"{within}: {{{key}: {spelt}}}")
        ended = text if not text or text.endswith("\n") else text + newline
        return f"{ended}{within}:{newline}  {key}: {spelt}{newline}"
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
    # More than a colon and space between them: a comment.
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
