"""The surface that users build on, one identifier a line: commands, options, exit codes, keys, files, routes, names.

``python tests/golden/surface.py`` (``make surface``) writes it to ``surface.txt``. ``surface_released.txt.xz`` is the
surface of the last release: ``--released`` writes this file too. Until the first release, it is the surface of the day
on which the comparison began.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("surface.txt")
RELEASED = Path(__file__).with_name("surface_released.txt.xz")
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "docs" / "generate")]

import reference_cli  # noqa: E402
import reference_config  # noqa: E402
import reference_http  # noqa: E402
from json_keys import SOURCE, Keys, Made, Reader  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from reference_python import methods, plain, signature  # noqa: E402
from reference_sources import API, DOCUMENTS, GROUPS, REQUESTS, ROUTES, ROW_ERRORS  # noqa: E402

import tunewright  # noqa: E402
from making.deploy_files import metric_labels  # noqa: E402
from tunewright.config import Config  # noqa: E402
from tunewright.serving.tenants import tables  # noqa: E402

ANSWERS = ("responses", "responses_api", "messages_api", "app", "errors")
"""Modules of the gateway that make the documents of answers."""
_LINE = re.compile(r"(?P<kind>[a-z-]+)(?: (?P<owner>[^:]+))?: (?P<name>.+?)(?: = (?P<about>.*))?")


class Line(NamedTuple):
    """An identifier: its kind, the command or class that it belongs to, its name, and its type or meaning."""

    kind: str
    owner: str
    name: str
    about: str = ""

    def __str__(self) -> str:
        return f"{f'{self.kind} {self.owner}'.strip()}: {self.name}{self.about and f' = {self.about}'}"


def lines(reader: Reader | None = None) -> set[Line]:
    """Return the whole surface."""
    reader = reader or Reader()
    shown: set[Line] = set()
    classes = [made for model, _ in DOCUMENTS.values() if model is not Config for made in [_class(reader, model)]]
    for entry in reference_cli.entries():
        callback = inspect.unwrap(entry.command.callback)
        made = reader.function(callback.__module__, callback.__qualname__)
        printed = reader.printed(made)
        shown |= {*option_lines(entry), *(Line("exit", entry.name, str(code)) for code in reader.exits(made) - {0, 2})}
        shown |= set(_json_lines(entry.name, printed, ""))
        classes += _classes(printed)
    shown |= {Line("exit", "*", code, meaning) for code, meaning in reference_cli.CODES.items()}
    shown |= set(config_lines(reference_config.keys())) | set(_http_lines(reader)) | set(_api_lines())
    classes += [_class(reader, each) for members in API.values() for each in members if _has_fields(each)]
    shown |= set(_field_lines(reader, classes))
    shown |= {Line("file", name, model.__name__, _bare(place)) for name, (model, place) in DOCUMENTS.items()}
    for table in tables.metadata.sorted_tables:
        shown |= {Line("table", "", table.name), *(Line("column", table.name, each.name) for each in table.columns)}
    shown |= {Line("row-error", "", code) for code in ROW_ERRORS}
    shown |= {Line("metric", "", name, " ".join(sorted(labels))) for name, labels in metric_labels().items()}
    return shown | {Line("environment", "", name) for name in _variables()}


def option_lines(entry: reference_cli.Entry) -> Iterator[Line]:
    """Yield a command and its arguments and options."""
    yield Line("command", "", entry.name)
    for each in entry.command.params:
        if reference_cli.is_argument(each):
            yield Line("argument", entry.name, reference_cli.metavar(each), "required" if each.required else "optional")
        elif not each.hidden:
            value, default = reference_cli.value(each), reference_cli.default(each)
            about = f"{value}; {default}" if default else value
            yield Line("option", entry.name, _bare(reference_cli.names(each)), _bare(about))


def config_lines(keys: Iterable[reference_config.Key]) -> Iterator[Line]:
    """Yield the keys of the config with type and default."""
    for key in keys:
        yield Line("config", "", key.name, _bare(f"{reference_config.kind(key)}; {reference_config.default(key)}"))


def _bare(text: str) -> str:
    return text.replace("`", "")


def _json_lines(command: str, keys: Keys, within: str) -> Iterator[Line]:
    for each in keys.classes if not within else ():
        yield Line("json", command, each.node.name)
    for name, below in keys.own.items():
        yield Line("json", command, within + name, " | ".join(each.node.name for each in below.classes))
        yield from _json_lines(command, below, f"{within}{name}.")


def _classes(keys: Keys) -> list[Made]:
    return [*keys.classes, *(made for below in keys.own.values() for made in _classes(below))]


def _class(reader: Reader, of: type) -> Made:
    found = reader.find(of.__module__, of.__name__)
    assert isinstance(found, Made), of
    return found


def _has_fields(each: Any) -> bool:
    return inspect.isclass(each) and (dataclasses.is_dataclass(each) or issubclass(each, BaseModel))


def _field_lines(reader: Reader, classes: Iterable[Made]) -> Iterator[Line]:
    """Yield the fields of classes, and of the classes that they hold; the config has lines of its own."""
    left, seen = list(classes), set()
    while left:
        made = left.pop()
        if made in seen or made.node.name == Config.__name__:
            continue
        seen.add(made)
        for owner, each in _fields(reader, made):
            annotation = plain(each.annotation)
            yield Line("field", made.node.name, ast.unparse(each.target), ast.unparse(annotation))
            left += reader.annotated(annotation, owner.module).classes


def _fields(reader: Reader, made: Made) -> Iterator[tuple[Made, ast.AnnAssign]]:
    """Yield the fields of a class and its bases, with the class that declares each."""
    for base in reader.bases(made):
        yield from _fields(reader, base)
    for each in made.node.body:
        is_field = isinstance(each, ast.AnnAssign) and not ast.unparse(each.annotation).startswith("ClassVar")
        if is_field and not ast.unparse(each.target).startswith("_"):
            yield made, each


def _http_lines(reader: Reader) -> Iterator[Line]:
    yield from (Line("route", "", route) for route in ROUTES)
    for route, model in REQUESTS.items():
        for name, each in model.model_fields.items():
            about = reference_config.described(each.annotation, tuple(each.metadata))
            yield Line("request", route, each.alias or name, _bare(about))
    yield from (Line("error", "", code, status) for code, status, _ in reference_http.refusals())
    for module in ANSWERS:
        for node in ast.walk(reader.trees[f"tunewright.serving.gateway.{module}"]):
            keys = node.keys if isinstance(node, ast.Dict) else ()
            yield from (Line("answer", module, str(each.value)) for each in keys if isinstance(each, ast.Constant))


def _api_lines() -> Iterator[Line]:
    yield from (Line("python", "tunewright", name) for name in tunewright.__all__)
    others = {each.__name__: each for members in API.values() for each in members if inspect.isclass(each)}
    for owner, group in (GROUPS | {name: each for name, each in others.items() if each not in GROUPS.values()}).items():
        yield Line("python", "", owner)
        for name, each in methods(group):
            yield Line("python", owner, name, "" if isinstance(each, property) else signature(each))


def _variables() -> set[str]:
    source = "\n".join(file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py"))
    return set(re.findall(r"\bTUNEWRIGHT_[A-Z_]+\b", source))


def read(file: Path) -> set[Line]:
    """Return the lines of a stored surface."""
    stored = lzma.decompress(file.read_bytes()) if file == RELEASED else file.read_bytes()
    found = map(_LINE.fullmatch, stored.decode().splitlines())
    return {Line(*(each or "" for each in match.groups())) for match in found if match is not None}


def unreleased(changelog: str) -> list[str]:
    """Return the bullets of a changelog's first section if this is of a version that is not released."""
    heading, _, section = changelog.partition("\n## ")[2].partition("\n## ")[0].partition("\n")
    bullets = re.split(r"^(?:- |\n)", section, flags=re.MULTILINE) if heading.endswith(" (unreleased)") else []
    return [" ".join(each.split()) for each in bullets]


def unnamed(before: Iterable[Line], now: Iterable[Line], bullets: Iterable[str]) -> list[str]:
    """Return what to write into the changelog, for each difference of two surfaces that no bullet names.

    A new or removed command stands for its options, keys and exit codes, and a class for its fields.
    """
    before, now, bullets = set(before), set(now), list(bullets)
    names = [{each[:3] for each in side} for side in (before, now)]
    owners = [{word for each in side for word in each[1:]} for side in names]
    found = []
    for each in sorted(before ^ now, key=str):
        if each.owner in (owners[0] ^ owners[1]) - {""}:
            continue
        what = "changed" if all(each[:3] in side for side in names) else "removed" if each in before else "added"
        patterns = [rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in _words(each)]
        if not any(all(re.search(pattern, text) for pattern in patterns) for text in bullets):
            named = " and ".join(f"`{word}`" for word in _words(each))
            found.append(
                f"{what}: {each}\n    CHANGELOG.md needs a bullet that names {named} in the unreleased version."
            )
    return found


def _words(line: Line) -> list[str]:
    """Return the words that a bullet on a line contains."""
    name = f"exit code {line.name}" if line.kind == "exit" else re.split(r",| \(", line.name)[0]
    owner = [line.owner] if line.kind in {"option", "argument", "json", "exit"} and line.owner != "*" else []
    return [*owner, name.rpartition(".")[2] if line.kind == "json" else name]


if __name__ == "__main__":
    text = "".join(f"{line}\n" for line in sorted(map(str, lines())))
    GOLDEN.write_text(text, encoding="utf-8")
    if "--released" in sys.argv:
        RELEASED.write_bytes(lzma.compress(text.encode()))
