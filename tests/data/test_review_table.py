"""Reviews by way of a spreadsheet: what is filled in counts as if it were typed, what is mangled is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import Listener, unlike_pairs
from review_helpers import judge_next, review, reviewed_project, right, status

from tunewright.annotation import SheetImport
from tunewright.config.project import ProjectFolder
from tunewright.core.csv import restored_cell
from tunewright.core.errors import UserError
from tunewright.data.review.reviews import read_reviews
from tunewright.data.review.session import ReviewSession
from tunewright.data.trace import places_by_key
from tunewright.data.versions import load_version

Row = dict[str, str]

AWKWARD = [
    ('she said "no", twice', "an answer;\nof two lines\twith a tab"),
    ("Müller fragt: größer?", "ünïcödé, and a comma"),
    ("=1+1", " leading space"),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    return reviewed_project(tmp_path_factory.mktemp("table") / "p", pairs=[*unlike_pairs(60), *AWKWARD])


@pytest.fixture
def project(pristine: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    shutil.copytree(pristine.root, tmp_path / "p")
    return ProjectFolder(tmp_path / "p")


def _export(project: ProjectFolder, most: int = 100) -> tuple[Path, list[Row]]:
    path = project.root / "review.csv"
    places = places_by_key(project.dataset, load_version(project.dataset).manifest)
    count = review(project).export_sheet(path, most, places)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    return path, rows


def _save(path: Path, rows: list[Row], delimiter: str = ",", line_end: str = "\r\n") -> None:
    """As a spreadsheet saves."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    table.writeheader()
    table.writerows(rows)
    path.write_text("\ufeff" + text.getvalue().replace("\r\n", "\n").replace("\n", line_end), "utf-8", newline="")


def _import(project: ProjectFolder, path: Path, reviewer: str = "ada") -> SheetImport:
    version = load_version(project.dataset)
    return ReviewSession(project.dataset, version, reviewer, Listener(), suspects=()).import_sheet(path)


def test_export_csv_contains_exact_texts_in_sample_order(project: ProjectFolder) -> None:
    _, rows = _export(project)
    members = {m.key: m for m in load_version(project.dataset).members}
    assert [row["row"] for row in rows] == review(project).order
    for row in rows:
        example = members[row["row"]].example
        assert restored_cell(row["input"]) == example.input_text
        assert (restored_cell(row["answer"]), row["verdict"]) == (example.output, "")
    assert [row["input"] for row in rows if "1+1" in row["input"]] == ["'=1+1"]  # no formula for the spreadsheet


def test_export_csv_contains_the_place_of_each_row(project: ProjectFolder) -> None:
    _, rows = _export(project)
    lines = [json.loads(line) for line in (project.root / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    members = {m.key: m for m in load_version(project.dataset).members}
    for row in rows:
        name, _, line = row["from"].partition(":")
        assert (name, lines[int(line) - 1]["prompt"]) == ("pairs.jsonl", members[row["row"]].example.input_text)


@pytest.mark.parametrize(("delimiter", "line_end"), [(",", "\n"), (";", "\r\n")])
def test_import_csv_counts_verdicts_like_a_session(project: ProjectFolder, delimiter: str, line_end: str) -> None:
    path, rows = _export(project)
    for row in rows:
        row["verdict"] = " Right "
    rows[5] |= {"verdict": "edit", "new_output": "better,\nover two lines"}
    rows[6] |= {"verdict": "skip"}
    rows[7] |= {"verdict": ""}
    _save(path, rows, delimiter, line_end)
    assert _import(project, path) == SheetImport(recorded=len(rows) - 1, known=0, blank=1)
    reviews = read_reviews(project.dataset)
    assert reviews.current_verdicts(rows[5]["row"])["ada"].output == "better,\nover two lines"
    assert reviews.finding(rows[6]["row"]) == "unsettled"
    assert reviews.finding(rows[7]["row"]) is None
    line = status(project)
    assert line.startswith("under review: 1 of 7 wrong")
    assert line.endswith(", 1 unsettled")


def test_import_csv_records_nothing_twice(project: ProjectFolder) -> None:
    path, rows = _export(project, 3)
    rows[0]["verdict"] = "right"
    _save(path, rows)
    assert _import(project, path).recorded == 1
    assert _import(project, path) == SheetImport(recorded=0, known=1, blank=2)
    assert _import(project, path, "ben").recorded == 1


def _changed(field: str, value: str) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        rows[1][field] = value

    return change


def _twice(rows: list[Row]) -> None:
    rows[1] = dict(rows[0])


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (_changed("verdict", "maybe"), "invalid verdict 'maybe'"),
        (_changed("row", "0" * 64), "has no row"),
        (_changed("answer", "2026-01-02"), "the answer was changed"),
        (_changed("new_output", "better"), "requires the verdict edit"),
        (_changed("verdict", "edit"), "verdict edit requires new_output"),
        (_changed("draw", "first"), "invalid draw 'first'"),
        (_twice, "duplicate of line"),
    ],
)
def test_import_csv_names_a_faulty_row_and_records_nothing(
    project: ProjectFolder, change: Callable[[list[Row]], None], reported: str
) -> None:
    path, rows = _export(project, 4)
    for row in rows:
        row["verdict"] = "right"
    change(rows)
    _save(path, rows)
    before = (project.dataset / "reviews.jsonl").read_bytes()
    with pytest.raises(UserError, match=reported) as refused:
        _import(project, path)
    assert f"{path}:" in str(refused.value)
    assert (project.dataset / "reviews.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (b"", "Missing or repeated column: row"),
        (b"row,verdict\nabc,right\n", "Missing or repeated column: draw, answer, new_output"),
        ("row,draw,answer,verdict,new_output\nä".encode("utf-16"), "The file is not UTF-8"),
        (b"row,draw,answer,verdict,new_output\na,b\n", "2 fields where the header has 5"),
        (b'row,draw,answer,verdict,new_output\n"a\n', "Invalid CSV"),
    ],
)
def test_import_csv_refuses_other_files(project: ProjectFolder, content: bytes, reported: str) -> None:
    path = project.root / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reported):
        _import(project, path)
    with pytest.raises(UserError, match="Cannot read the file"):
        _import(project, project.root / "missing.csv")


def test_export_csv_does_not_overwrite_and_reports_an_empty_queue(project: ProjectFolder) -> None:
    path, _ = _export(project)
    with pytest.raises(UserError, match="The file already exists"):
        review(project).export_sheet(path, 5, {})
    judge_next(review(project), *right(len(load_version(project.dataset).members)))
    with pytest.raises(UserError, match="No row is left"):
        review(project).export_sheet(project.root / "more.csv", 5, {})


def test_import_csv_refuses_a_secret(project: ProjectFolder) -> None:
    path, rows = _export(project)
    card = "4539 1488 0343 6467"
    for row in rows:
        row["verdict"] = "right"
    rows[2] |= {"verdict": "edit", "new_output": f"pay with {card}"}
    _save(path, rows)
    with pytest.raises(UserError, match=r"new_output contains a secret \(payment card number\)") as caught:
        _import(project, path)
    assert card not in str(caught.value)
    assert read_reviews(project.dataset).current_verdicts(rows[2]["row"]) == {}
    version = load_version(project.dataset)
    session = ReviewSession(project.dataset, version, "ada", Listener(), suspects=(), allow=["card"])
    assert session.import_sheet(path).recorded == len(rows)


def test_export_csv_suggests_an_adapter_when_no_row_can_be_judged(project: ProjectFolder) -> None:
    none = ReviewSession(project.dataset, load_version(project.dataset), "ada", Listener(), suspects=[])
    with pytest.raises(UserError, match="There are no suspects to export") as caught:
        none.export_sheet(project.root / "suspects.csv", 100, {})
    assert "--adapter base" in (caught.value.fix or "")
