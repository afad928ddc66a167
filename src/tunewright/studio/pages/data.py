"""The dataset: its versions, and files on their way into it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.config import EvaluateConfig
from tunewright.config.io import write_section
from tunewright.config.project import CONFIG_FILE
from tunewright.core.errors import UserError
from tunewright.core.text import capitalised, count_of
from tunewright.data.dedup.leakage import similarity_blocks
from tunewright.data.options import AddOptions, ColumnMapping
from tunewright.data.review.label_models import excerpt
from tunewright.data.splits import SPLITS
from tunewright.data.task import TaskOfAnswers, task_of
from tunewright.data.versions import current_manifest
from tunewright.data.versions.diff import comparability, summary, word_changes
from tunewright.data.versions.version import version_table
from tunewright.evidence.power import split_power, split_power_text
from tunewright.render.blocks import table, words
from tunewright.studio.access import ChangedRows
from tunewright.studio.computed import PageReporter
from tunewright.studio.pages.rows import row_link
from tunewright.studio.visit import Handlers, Visit, in_form, positive_numbers
from tunewright.studio.words import ROLES, TURN, version_name

if TYPE_CHECKING:
    from tunewright.data.notices import Conflict
    from tunewright.data.preview import Effect, FilePreview

UPLOADS = "uploads"
"""The folder of uploaded files, in the project's folder."""
MAX_UPLOAD = 200_000_000  # bytes, held in memory once

_FAULTS = 100  # number of a file's faults on its page
_ROWS = 50  # rows of each kind of change between two versions
_NEAREST = 10  # pairs of a held-out row and a training row
_MEASURED_AT_ONCE = 20_000  # rows, whose leakage takes seconds to measure
_CELL = 120  # characters of a value in the preview of a file
_LONGEST = 400  # characters of a changed row
_CHANGES = 20  # changes of a corrected copy, on the next page
_FLAGS = {
    "skip_bad": "Leave faulty rows out",
    "redact": "Replace secrets and personal data with placeholders",
    "accept_conflicts": "Keep inputs with different answers",
    "replace": "Let a new answer replace the known one of the same input",
}
_SPLIT_BY = {
    "input": "Only similar inputs stay in one split.",
    "output_template": "Answers of the same form stay in one split too.",
}
_MAPPING = ("sheet", "header_row", "input", "output")
_COPY = re.compile(r"-corrected(-\d+)?$")
_KEEP = "keep "
"""Begins the name of a field that chooses one answer of a conflict."""
_ANSWER = "answer "
"""Begins the name of a field with the answer of a row that has none."""
_HEADER_ROW = re.compile(r"--header-row (\d+)")


def data_page(visit: Visit) -> Response:
    """Show a form that takes a file, the files that can be added, and the versions."""
    current = current_manifest(visit.project.folder.dataset)
    versions = visit.project.data.log()[::-1]
    return visit.page(
        "data.html.j2",
        "Data",
        files=list(_files(visit)),
        max_upload=MAX_UPLOAD,
        versions=versions,
        table=[version_table(versions, current)],
        current=current.digest if current else "",
        answers=_task(visit),
        metric=visit.project.folder.config.evaluate.metric,
    )


def _task(visit: Visit) -> TaskOfAnswers | None:
    """Return the task of the current rows' answers; None if there are no rows or the config names a metric."""
    if not _current(visit) or "metric" in visit.project.folder.config.evaluate.model_fields_set:
        return None
    examples = [member.example for member in visit.version.domain]
    return task_of(examples) if examples else None


def choose_metric(visit: Visit) -> Response:
    """Write the metric that fits the answers to the config."""
    found, folder = _task(visit), visit.project.folder
    if found is None:
        return visit.go("/data", f"{CONFIG_FILE} names a metric by now, or the rows are gone. Nothing was set.")
    fitting, now = EvaluateConfig.model_validate(found.metrics), folder.config.evaluate
    extra = tuple(each for each in now.extra_metrics or fitting.extra_metrics if each != fitting.metric)
    written = write_section(
        folder.root / CONFIG_FILE, now.model_copy(update={"metric": fitting.metric, "extra_metrics": extra})
    )
    return visit.go("/data", f"Set in {CONFIG_FILE}: {', '.join(f'evaluate.{key}' for key in written)}.")


def check_page(visit: Visit) -> Response:
    """Show what adding an uploaded file would do, and let its columns be chosen."""
    (name, file), options, mapping = _file(visit, visit.query), _add_options(visit.query), _mapping(visit.query)
    data = visit.project.data
    sheets: tuple[str, ...] = ()
    preview = checked = None
    refusals: list[UserError] = []
    try:
        sheets = data.sheets(file)
        preview = data.preview_file(file, mapping)
    except UserError as refusal:
        refusals.append(refusal)
    try:
        checked = data.check_files([file], options)
    except UserError as refusal:
        refusals.insert(0, refusal)
    else:
        unreadable = [each.unreadable for each in checked.files.files if each.unreadable]
        refusals = [
            *(UserError(str(e["what"]), where=e["where"], fix=e["fix"]) for e in unreadable),
            *checked.refusals,
            *refusals,
        ]
    fields = {name: value for name, value in visit.query.items() if name in (*_FLAGS, *_MAPPING) and value}
    faults = checked.files.faults[:_FAULTS] if checked else []
    conflicts = [(each.input, _choices(file, each)) for each in checked.conflicts] if checked else []
    known = not conflicts or any(each.place.startswith("version ") for _, choices in conflicts for each in choices)
    # A new answer replaces known ones only.
    flags = {name: text for name, text in _FLAGS.items() if known or name != "replace"}
    return visit.page(
        "check.html.j2",
        "Data",
        file=name,
        fields=fields,
        step=_step(refusals, preview, fields),
        found=not any("--input" in (refusal.fix or "") for refusal in refusals),
        header_row=next((found[1] for each in refusals if (found := _HEADER_ROW.search(each.fix or ""))), ""),
        flags=_FLAGS,
        sheets=sheets,
        preview=preview,
        checked=checked,
        # Paths as people know them: relative to the project's folder.
        refusals=dict.fromkeys(
            _on_page(refusal, flags).replace(f"{visit.project.folder.root}/", "") for refusal in refusals
        ),
        version=_current(visit),
        by_form=_by_form(visit),
        power=_power(visit, checked.effect) if checked and checked.effect else "",
        most=_FAULTS,
        faulty_rows=_rows_at(visit, file, visit.query, {fault.line for fault in faults}),
        cell=_cell,
        conflicts=conflicts[:_FAULTS],
        keep=_KEEP,
        answer=_ANSWER,
        why_kept=_why_kept(visit, name),
        seen=file.stat().st_mtime_ns,
        excerpt=excerpt,
    )


def _rows_at(visit: Visit, file: Path, fields: dict[str, str], lines: set[int]) -> dict[int, list[tuple[str, str]]]:
    """Return the columns of rows with the beginnings of their values, as far as the rows can be parsed."""
    from tunewright.data.add import map_columns
    from tunewright.data.given_split import settings_of
    from tunewright.data.preview import rows_at

    if not lines:
        return {}
    data = map_columns(settings_of(file, visit.project.folder), _mapping(fields), [file])
    rows = rows_at(file, data, lines)
    return {line: [(name, _cell(value)) for name, value in row.items()] for line, row in rows.items()}


def _check_again(visit: Visit) -> Response:
    """Show the page of the file whose form was refused."""
    visit.query = {name: value for name, value in visit.form.items() if name in ("file", *_FLAGS, *_MAPPING)}
    return check_page(visit)


def _power(visit: Visit, effect: Effect) -> str:
    """Return the smallest difference that the planned test split can show, in words."""
    sizes = {split: size for size in effect.splits for split in SPLITS if size.split == split}
    rows = {split: size.rows for split, size in sizes.items()}
    clusters = {split: size.clusters for split, size in sizes.items()}
    return split_power_text(split_power(rows, clusters, visit.project.folder.config.data.test_size))


def _by_form(visit: Visit) -> bool | None:
    """Return whether answers of one form stay in one split; None if that is decided or does not matter here."""
    if _current(visit):
        return None
    chosen = visit.project.folder.config.data.split_by == "output_template"
    reporter = visit.project.reporter
    asked = isinstance(reporter, PageReporter) and any("data.split_by" in message for message in reporter.messages)
    return chosen if chosen or asked else None


def choose_split(visit: Visit) -> Response:
    """Write to the config what the split keeps together, while there are no rows yet."""
    name, _ = _file(visit, visit.form)
    choice = visit.chosen("split_by", _SPLIT_BY)
    if _current(visit):
        return visit.go(_check_path(name, visit.form), "There are rows by now, and their split stays. Nothing was set.")
    folder = visit.project.folder
    wanted = folder.config.data.model_copy(update={"split_by": choice})
    write_section(folder.root / CONFIG_FILE, wanted)
    return visit.go(_check_path(name, visit.form), f"{_SPLIT_BY[choice]} This is the effect now.")


def _step(refusals: Sequence[UserError], preview: FilePreview | None, fields: dict[str, str]) -> str:
    """Return the choices that the page asks for before a file can be checked: sheet or columns; empty if none."""
    options = [refusal.fix or "" for refusal in refusals]
    if "sheet" not in fields and any("--sheet" in fix for fix in options):
        return "sheet"
    if "header_row" not in fields and any(map(_HEADER_ROW.search, options)):
        return "header_row"
    # A file without a row, or a single column, has nothing to choose from.
    ready = preview is not None and preview.rows and len(preview.columns) > 1
    return "columns" if ready and any("--input" in fix for fix in options) else ""


def add_file(visit: Visit) -> Response:
    """Add an uploaded file as a new version."""
    _, file = _file(visit, visit.form)
    if visit.form.get("version", "") != _current(visit):
        what = "Another tab or a terminal changed the dataset. Nothing was added; this page shows the effect now"
        raise UserError(what, where="version", fix="Add the file again if the effect is right.")
    added = visit.project.data.add([file], _add_options(visit.form), message=visit.form.get("message", ""))
    state, version = "is new" if added.created else "has all of these rows already", added.version
    return visit.go("/data", f"{capitalised(version_name(version))} {state}: {count_of(version.counts.rows, 'row')}.")


def _why_kept(visit: Visit, name: str) -> str:
    """Return why a file cannot be removed: a version or the config names it; empty if it can be."""
    stored = f"{UPLOADS}/{name}"
    if name.startswith("./") or f"./{stored}" in _files(visit):
        return f"{CONFIG_FILE} lists {name} in data.sources"
    for version in visit.project.data.log():
        mixed = [] if version.mix is None else [version.mix.source]
        # The sheet of a workbook is FILE:SHEET; a second file of a name has its digest behind an @.
        if any(re.fullmatch(rf"{re.escape(stored)}([:@].*)?", each.name) for each in (*version.sources, *mixed)):
            return f"Rows of {version_name(version)} come from {name}"
    return ""


def remove_file(visit: Visit) -> Response:
    """Delete an uploaded file that no version has rows of."""
    name, file = _file(visit, visit.form)
    if why := _why_kept(visit, name):
        raise UserError(f"{why}. Nothing was removed", fix="Keep the file, to which the history of rows leads.")
    if visit.form.get("seen") != str(file.stat().st_mtime_ns):
        raise UserError(f"{name} was changed meanwhile. Nothing was removed", fix="Look at the file, and try again.")
    file.unlink()
    return visit.go("/data", f"Removed {name} from the folder {UPLOADS}. No version has rows of it.")


def fix_file(visit: Visit) -> Response:
    """Write a corrected copy of an uploaded file, and show what adding the copy would do.

    The copy lacks the rows of answers that were not chosen, and has the answers that were typed.
    """
    name, file = _file(visit, visit.form)
    ending = ".csv" if file.suffix.lower() == ".csv" else ".jsonl"
    uploads, stem = visit.project.folder.root / UPLOADS, f"{_COPY.sub('', file.name.partition('.')[0])}-corrected"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    copy = next(free for each in names if not (free := uploads / f"{each}{ending}").exists())
    fields = [value for field, value in visit.form.items() if field.startswith(_KEEP)]
    lines = {int(line) for value in fields for line in value.split() if line.isdecimal()}
    if not lines and "choose" in visit.form:
        return visit.go(_check_path(name, visit.form), "No answer was chosen. Nothing was written.")
    # The copy has no lines above its header; its columns are the file's.
    kept = {name: value for name, value in visit.form.items() if ending == ".csv" and name in ("input", "output")}
    typed = {name.removeprefix(_ANSWER): text for name, text in visit.form.items() if name.startswith(_ANSWER)}
    answers = {int(line): text for line, text in typed.items() if line.isdecimal() and text.strip()}
    changes = visit.project.data.fix_file(file, copy, _mapping(visit.form), leave_out=lines, answers=answers)
    if not changes:
        return visit.go(_check_path(copy.name, kept), f"Wrote {copy.name}.")
    lost = _rows_at(visit, file, visit.form, {each.line for each in changes[:_CHANGES] if each.left_out})
    whole = {line: ", ".join(f"{column}: {text}" for column, text in row) for line, row in lost.items()}
    rows = [
        (str(each.line), each.what, whole.get(each.line, _short(each.before)), "(left out)")
        if each.left_out
        else (str(each.line), each.what, _short(each.before), _short(each.after))
        for each in changes[:_CHANGES]
    ]
    more = f" ({len(changes) - _CHANGES:,} more are not shown)" if len(changes) > _CHANGES else ""
    shown = ChangedRows(f"Wrote {copy.name}. These rows of {file.name} changed{more}:", rows)
    return visit.go(_check_path(copy.name, kept), shown)


@dataclass(frozen=True)
class Choice:
    """An answer of a conflict, its place, and the lines that the file has to leave out to keep it; empty if none."""

    answer: str
    place: str
    leave_out: str


def _choices(file: Path, conflict: Conflict) -> list[Choice]:
    """Return the answers of a conflict, of which at least one is in the file."""
    lines = [int(place.rpartition(":")[2]) if place.startswith(f"{file}:") else 0 for place in conflict.places]
    choices = []
    for line, output, place in sorted(zip(lines, conflict.outputs, conflict.places, strict=True)):
        others = [str(other) for other in lines if other not in (0, line)]
        choices.append(Choice(output, f"line {line}" if line else place, " ".join(others)))
    return choices


def _short(text: str | None) -> str:
    text = TURN.sub(lambda turn: f"{ROLES[turn[1]]}: ", text or "")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def checkout(visit: Visit) -> Response:
    """Make an earlier version the current one."""
    manifest = visit.project.data.checkout(visit.form.get("version", ""))
    return visit.go("/data", f"V{version_name(manifest)[1:]} is the current one now.")


def diff_page(visit: Visit) -> Response:
    """Show the difference between two versions."""
    versions = visit.project.data.log()[::-1]
    if len(versions) < 2:
        raise UserError("There are fewer than two versions", fix="Add a file, or edit answers in a review.")
    parents = {each.digest: each.parent for each in versions}
    after = visit.query.get("b") or _current(visit)
    before = visit.query.get("a") or parents.get(after) or versions[-1].digest
    found = visit.project.data.diff(before, after)
    return visit.page(
        "diff.html.j2",
        "Difference",
        versions=versions,
        found=found,
        summary=summary(found),
        comparability=comparability(found),
        word_changes=word_changes,
        most=_ROWS,
        excerpt=excerpt,
    )


def leakage_page(visit: Visit) -> Response:
    """Show how similar held-out rows are to training rows; of a large version only on request."""
    rows = len(visit.version.members)
    known = visit.cache.has("leakage", (visit.version.digest, visit.project.folder.config.seed))
    if rows > _MEASURED_AT_ONCE and not known and "measure" not in visit.query:
        return visit.page("leakage.html.j2", "Leakage", rows=rows, report=None)
    report = visit.leakage
    nearest = sorted(report.nearest, key=lambda row: -row.similarity)[:_NEAREST]
    by_key = {member.key: member for member in visit.version.members}
    head, pairs = ("Similarity", *words("Held-out row", "Training row")), []
    for row in nearest:
        if row.of is not None:
            held_out, trained = by_key[row.key], by_key[row.of]
            text = f"{row.split}: {excerpt(held_out.example.input_text)}"
            near = row_link(trained, excerpt(trained.example.input_text))
            pairs.append((f"{row.similarity:.2f}", row_link(held_out, text), near))
    return visit.page(
        "leakage.html.j2",
        "Leakage",
        rows=rows,
        report=similarity_blocks(report),
        nearest=table("Most similar pairs", head, pairs),
    )


def _files(visit: Visit) -> dict[str, Path]:
    """Return the files that can be added by their names on the page: uploaded files, and ``./FILE`` of data.sources."""
    root = visit.project.folder.root
    uploads = {file.name: file for file in sorted((root / UPLOADS).glob("[!.]*")) if file.is_file()}
    sources = {f"./{each.path}": root / each.path for each in visit.project.folder.config.data.sources}
    return uploads | {name: file for name, file in sources.items() if file.is_file()}


def _file(visit: Visit, fields: dict[str, str]) -> tuple[str, Path]:
    """Return the name and path of the file that a form or an address names."""
    name = fields.get("file", "")
    files = _files(visit)
    if name not in files:
        raise UserError(f"There is no uploaded file {name!r}", fix="Upload it on the page Data.")
    return name, files[name]


def _cell(value: object) -> str:
    """Return a value of a file on one line; messages as a conversation, not as JSON."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        value = " ".join(f"{ROLES.get(str(each['role']), each['role'])}: {each.get('content') or ''}" for each in value)
    return excerpt(str(value), _CELL)[1:-1]


def _current(visit: Visit) -> str:
    manifest = current_manifest(visit.project.folder.dataset)
    return manifest.digest if manifest else ""


def _check_path(file: str, fields: dict[str, str] | None = None) -> str:
    kept = {name: value for name, value in (fields or {}).items() if name in (*_FLAGS, *_MAPPING)}
    return f"/data/check?{urlencode({'file': file, **kept})}"


def _mapping(fields: dict[str, str]) -> ColumnMapping:
    sheet, _, input_column, output_column = (fields.get(name) or None for name in _MAPPING)
    header_row = next((int(float(number)) or 1 for number in positive_numbers(fields, "header_row")), None)
    return ColumnMapping(None, sheet, input_column, output_column, header_row)


def _add_options(fields: dict[str, str]) -> AddOptions:
    return AddOptions(
        _mapping(fields),
        skip_bad="skip_bad" in fields,
        redact="redact" in fields,
        accept_conflicts="accept_conflicts" in fields,
        replace="replace" in fields,
    )


def _on_page(refusal: UserError, flags: Mapping[str, str]) -> str:
    """Return a refusal with the page's own choices, such as its ``flags``, in place of the command's options."""
    fix = refusal.fix or ""
    ticks = [f'tick "{text}"' for name, text in flags.items() if f"--{name.replace('_', '-')}" in fix]
    if "--leave-out" in fix:
        ticks.insert(0, "choose the answers to keep")
    if "--input" in fix:
        ticks = ["choose the columns of the input and of the answer"]
    if ticks:
        fix = f"Correct the file, or {' or '.join(ticks)} below, and check again."
    where = None if "(--" in (refusal.where or "") else refusal.where  # an option; the page has its field
    return str(UserError(refusal.what, where=where, fix=fix or None))


HANDLERS: Handlers = {
    ("GET", "/data"): data_page,
    ("GET", "/data/check"): check_page,
    ("POST", "/data/add"): in_form("/data/check", _check_again, add_file),
    ("POST", "/data/fix"): in_form("/data/check", _check_again, fix_file),
    ("POST", "/data/remove"): in_form("/data/check", _check_again, remove_file),
    ("POST", "/data/split-by"): choose_split,
    ("POST", "/data/metric"): choose_metric,
    ("POST", "/data/checkout"): in_form("/data", data_page, checkout),
    ("GET", "/data/diff"): diff_page,
    ("GET", "/data/leakage"): leakage_page,
}
