"""The settings that matter, with their documentation: a form on the keys of ``tunewright.yaml``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from starlette.responses import Response

from tunewright.config import Config, metric_name
from tunewright.config.io import load_config, parse_value, set_keys, with_keys
from tunewright.config.metrics import Choices, PlainMetric
from tunewright.config.project import CONFIG_FILE
from tunewright.core.errors import UserError
from tunewright.core.options import TaskName
from tunewright.data.task import TASKS, Task, task_of
from tunewright.data.versions import current_manifest
from tunewright.models.bases import check_spec
from tunewright.studio.visit import Handlers, Visit
from tunewright.studio.words import SETTINGS

SETTINGS_PAGE = "/settings"
_GROUPS = {"": "Model", "data": "Rows", "train": "Training", "evaluate": "Evaluation", "judge": "Judge"}
_BASE = "base_model"
_METRIC = "evaluate.metric"
_CHOICES = "choices"
"""The field of a metric's allowed answers, which the metric's key holds in the file."""
_VERBS: dict[TaskName, str] = {
    "labels": "Classify",
    "short": "Answer shortly",
    "json": "Extract",
    "sql": "Write SQL",
    "calls": "Call tools",
    "text": "Summarise or write",
    "chat": "Chat",
}


@dataclass(frozen=True)
class _Field:
    """A field of the form, and the documentation of its key."""

    name: str
    label: str
    kind: str
    """``line``, ``paragraph``, ``lines``, ``number`` or ``options``."""
    about: str
    options: tuple[str, ...] = ()


def _field(key: str, label: str) -> _Field:
    section, _, name = key.rpartition(".")
    model: Any = Config.model_fields[section].annotation if section else Config
    found = model.model_fields[name]
    kinds = (found.annotation, *get_args(found.annotation))
    about = " ".join((found.description or "").split())
    if key == _METRIC:
        return _Field(key, label, "line", about, get_args(PlainMetric))
    if all(isinstance(option, str) for option in get_args(found.annotation)) and get_args(found.annotation):
        return _Field(key, label, "options", about, get_args(found.annotation))
    if name == "system_prompt":
        return _Field(key, label, "paragraph", about)
    kind = "lines" if get_origin(found.annotation) is tuple else "number" if {int, float} & {*kinds} else "line"
    return _Field(key, label, kind, about)


_ALLOWED = _Field(_CHOICES, "Allowed answers, one a line", "lines", "With the metric choices, other answers are wrong.")
_FIELDS: dict[str, _Field] = {}
for _key, _label in SETTINGS.items():
    _FIELDS |= {_key: _field(_key, _label)} | ({_CHOICES: _ALLOWED} if _key == _METRIC else {})


def _texts(config: Config) -> dict[str, str]:
    """Return the values of all fields as the form shows them."""
    texts = {}
    for name in SETTINGS:
        section, _, key = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, key)
        texts[name] = "\n".join(map(_text, value)) if isinstance(value, tuple) else _text(value)
    metric = config.evaluate.metric
    if isinstance(metric, Choices):
        return texts | {_METRIC: metric_name(metric), _CHOICES: "\n".join(metric.choices)}
    return texts | {_CHOICES: ""}


def _text(value: Any) -> str:
    """Return a value on one line; JSON for a value with parts."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if isinstance(plain, float):
        return f"{plain:.12f}".rstrip("0").removesuffix(".")
    return "" if plain is None else plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _value(field: _Field, text: str) -> Any:
    """Return the value that a text means; text that means none is left to the config's own checks."""
    if field.kind == "lines":
        return [_value(_Field("", "", "line", ""), line) for line in text.splitlines() if line.strip()]
    text = text.strip()
    if field.kind == "number" and text:
        try:
            return int(text) if re.fullmatch("[+-]?[0-9]+", text) else float(text)
        except ValueError:
            raise ValueError(f"Not a number (got {text!r})") from None
    if not text.startswith("{"):
        return text or None
    try:
        return parse_value(text)
    except ValueError:
        raise ValueError(f"Not a name, nor options in braces such as {{choices: [yes, no]}} (got {text!r})") from None


def _values(texts: Mapping[str, str], changed: set[str]) -> dict[str, Any]:
    """Return the config's values of the changed fields."""
    values = {name: _value(_FIELDS[name], texts[name]) for name in SETTINGS if name in changed}
    if {_METRIC, _CHOICES} & changed:
        metric = texts[_METRIC].strip()
        # Allowed answers that were typed mean this metric; another metric that was chosen drops them.
        if metric == _CHOICES or (_CHOICES in changed and _METRIC not in changed and texts[_CHOICES].strip()):
            values[_METRIC] = {_CHOICES: [line.strip() for line in texts[_CHOICES].splitlines() if line.strip()]}
        else:
            values[_METRIC] = _value(_FIELDS[_METRIC], metric)
    return values


def settings_page(visit: Visit) -> Response:
    """Show the settings of the config."""
    now = _texts(visit.project.folder.config)
    return _page(visit, now, now)


def save_settings(visit: Visit) -> Response:
    """Write the changed settings to the config, or show what keeps them from it next to their fields."""
    path = visit.project.folder.root / CONFIG_FILE
    # A stale or foreign form may lack fields.
    known = {name: visit.form.get(f"was {name}", "") for name in _FIELDS}
    typed = {name: visit.form.get(name, known[name]) for name in _FIELDS}
    try:
        now = _texts(load_config(path))
    except UserError as refusal:
        fault = f"{refusal}".replace(f"{visit.project.folder.root}/", "")
        return _page(visit, typed, known, refusals={"": f"Nothing was saved, because the file has a fault: {fault}"})
    if visit.form.get("action") == "propose":
        return _propose(visit, typed, known)
    changed = {name for name in _FIELDS if typed[name].strip() != known[name].strip()}
    elsewhere = {name: now[name] for name in _FIELDS if now[name] != known[name] and now[name] != typed[name]}
    asked = {name: text for name, text in elsewhere.items() if name in changed}
    if asked:
        said = f"{CONFIG_FILE} was changed meanwhile. Nothing was saved. Compare the marked settings, and save again."
        return _page(visit, now | {name: typed[name] for name in changed}, now, refusals={"": said}, in_file=asked)
    refusals: dict[str, str] = {}
    text = path.read_bytes().decode("utf-8-sig")
    for name in sorted(changed):
        try:
            values = _values(typed, {name})
            with_keys(text, path, values)
            if name == _BASE:
                check_spec(values[name], path.parent)
        except (UserError, ValueError) as refusal:
            what = refusal.what if isinstance(refusal, UserError) else str(refusal)
            refusals[name] = what.removeprefix(f"{name}: ")
    if refusals:
        return _page(visit, typed, known, refusals={"": "Nothing was saved. Correct the marked settings.", **refusals})
    values = _values(typed, changed)
    if not values:
        return visit.go(SETTINGS_PAGE, "No setting was changed.")
    try:
        set_keys(path, values)
    except UserError as refusal:
        return _page(visit, typed, known, refusals={"": f"Nothing was saved: {refusal.what}"})
    return visit.go(SETTINGS_PAGE, f"Set in {CONFIG_FILE}: {', '.join(values)}.")


def _propose(visit: Visit, typed: dict[str, str], known: dict[str, str]) -> Response:
    """Fill in the metric that fits the task; nothing is saved yet."""
    name: TaskName = next(each for each in TASKS if each == visit.chosen("task", TASKS))
    task = _tasks(visit)[name]
    said = f"The metric {_text(task.metric)} is filled in: {task.why}. Save to use it."
    return _page(visit, typed | {_METRIC: _text(task.metric)}, known, said=said)


def _tasks(visit: Visit) -> dict[TaskName, Task]:
    """Return all tasks; the rows may have a metric that fits them better than their task's usual one."""
    if current_manifest(visit.project.folder.dataset) is None:
        return TASKS
    version = visit.version
    examples = [member.example for member in version.domain]
    found = visit.cache.once("task", version.digest, lambda: task_of(examples) if examples else None)
    return {**TASKS, **found.variants} if found else TASKS


def _page(
    visit: Visit,
    texts: Mapping[str, str],
    known: Mapping[str, str],
    *,
    refusals: Mapping[str, str] | None = None,
    in_file: Mapping[str, str] | None = None,
    said: str = "",
) -> Response:
    """Return the form with these texts; ``known`` are those of the file, as the form's next sender knows them."""
    groups: dict[str, list[_Field]] = {}
    for name, field in _FIELDS.items():
        groups.setdefault(_GROUPS["evaluate" if name == _CHOICES else name.rpartition(".")[0]], []).append(field)
    page = visit.page(
        "settings.html.j2",
        "Settings",
        groups=groups,
        texts=texts,
        known=known,
        refusals=refusals or {},
        in_file=in_file or {},
        said=said,
        tasks={name: f"{_VERBS[name]}: {task.answers}" for name, task in TASKS.items()},
        metric=_METRIC,
        has_rows=current_manifest(visit.project.folder.dataset) is not None,
    )
    page.status_code = 400 if refusals else 200
    return page


HANDLERS: Handlers = {("GET", SETTINGS_PAGE): settings_page, ("POST", SETTINGS_PAGE): save_settings}
