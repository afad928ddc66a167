"""A review by way of a spreadsheet: blind, whole or not at all, and never of another evaluation."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from making.evidence import make_evidence, make_items
from making.human_evaluations import begin, evaluation, save, side_of_treatment
from tunewright.annotation import SheetImport
from tunewright.core.csv import restored_cell
from tunewright.core.errors import UserError

Row = dict[str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "evaluation")


def _export(folder: Path, *, reference: bool = False, items: int = 20) -> tuple[Path, list[Row]]:
    path = folder.parent / "sheet.csv"
    count = begin(folder, items=items).export_sheet(path, reference=reference)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    return path, rows


def _save(path: Path, rows: list[Row], delimiter: str = ",", line_end: str = "\r\n") -> None:
    """As a spreadsheet saves."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.write_bytes(text.getvalue().replace("\n", line_end).encode("utf-8-sig"))


def _kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "human-eval").iterdir()}


def test_sheet_lists_the_pairs_in_review_order(folder: Path) -> None:
    _, rows = _export(folder)
    review = begin(folder)
    assert [row["item"] for row in rows] == review.open_keys()
    for row in rows:
        pair = review.item(row["item"])
        assert [restored_cell(row[name]) for name in ("input", "A", "B")] == [pair.input, pair.a, pair.b]
        assert (row["verdict"], row["note"], row["evaluation"]) == ("", "", review.evidence.id)
    assert "reference" not in rows[0]


def test_sheet_bytes_do_not_reveal_the_arms(tmp_path: Path) -> None:
    """With the arms' answers exchanged, only which text is A changes, and everywhere the same way."""
    items = make_items(120, tuned=0.7, retrieved=0.3)
    swapped = [
        item.model_copy(
            update={
                "answers": {
                    **item.answers,
                    "tuned": item.answers["retrieved-4"],
                    "retrieved-4": item.answers["tuned"],
                }
            }
        )
        for item in items
    ]
    evidence = make_evidence(items)
    sheets = []
    for name, answers in (("one", items), ("two", swapped)):
        path, rows = _export(save(tmp_path / name / "evaluation", answers, evidence), items=119)
        data = path.read_bytes()
        assert not any(arm.name.encode() in data for arm in evidence.arms)
        sheets.append({row["item"]: row for row in rows})
    assert sheets[0].keys() == sheets[1].keys()
    for key, row in sheets[0].items():
        other = sheets[1][key]
        assert (row["A"], row["B"]) == (other["B"], other["A"])
        assert [row[n] for n in ("evaluation", "input", "verdict")] == [
            other[n] for n in ("evaluation", "input", "verdict")
        ]
    review = begin(tmp_path / "one" / "evaluation")
    treatment = [side_of_treatment(review, review.item(key)) for key in sheets[0]]
    assert 0.3 < treatment.count("A") / len(treatment) < 0.7


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_filled_in_verdicts_and_notes_are_recorded(folder: Path, delimiter: str, line_end: str) -> None:
    path, rows = _export(folder)
    for row, verdict in zip(rows, ["A", " b ", "Both", "NEITHER", "skip"], strict=False):
        row["verdict"] = verdict
    rows[0]["note"] = "-- the county,\nis missing"
    _save(path, rows, delimiter, line_end)
    assert begin(folder, "ben").import_sheet(path) == SheetImport(recorded=5, known=0, blank=15, notes=1)
    journal = begin(folder, "ben").log
    assert [journal.standing[row["item"]].verdict for row in rows[:5]] == ["A", "B", "both", "neither", "skip"]
    assert journal.notes == {rows[0]["item"]: {"ben": "-- the county,\nis missing"}}
    assert not any(judged.reference for judged in journal.standing.values())
    assert begin(folder, "ben").import_sheet(path) == SheetImport(recorded=0, known=5, blank=15, notes=0)


def test_import_marks_references_as_shown_when_the_sheet_has_them(folder: Path) -> None:
    path, rows = _export(folder, reference=True)
    rows[1]["verdict"] = "A"
    _save(path, rows)
    begin(folder).import_sheet(path)
    judged = begin(folder).log.standing
    assert [(key, each.reference) for key, each in judged.items()] == [(rows[1]["item"], True)]


def test_formula_like_texts_are_escaped_and_round_trip(tmp_path: Path) -> None:
    items = make_items(40, tuned=0.7, retrieved=0.3)
    items = [
        i.model_copy(update={"input": "=cmd|' /C calc'!A0", "answers": {"tuned": f"@{n}", "retrieved-4": f"'-{n}"}})
        for n, i in enumerate(items)
    ]
    folder = save(tmp_path / "evaluation", items, make_evidence(make_items(40)))
    path, rows = _export(folder)
    assert all(row[name][0] == "'" for row in rows for name in ("input", "A", "B"))
    rows[0]["verdict"] = "A"
    _save(path, rows)
    assert begin(folder).import_sheet(path).recorded == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "C"}, "the verdict is 'C'; it can be A, B, both, neither, skip or nothing"),
        ({"A": "something else"}, "answer A was changed"),
        ({"item": "f" * 64}, "the sample has no item"),
    ],
)
def test_bad_rows_are_named_by_their_lines_and_nothing_is_recorded(folder: Path, change: Row, message: str) -> None:
    path, rows = _export(folder)
    before = _kept(folder)
    for row in rows:
        row["verdict"] = "A"
    rows[2] |= change
    rows[4] |= change
    _save(path, rows)
    text = path.read_text(encoding="utf-8-sig").split("\n")
    lines = [n for n, line in enumerate(text, start=1) if rows[2]["item"][:20] in line or rows[4]["item"][:20] in line]
    with pytest.raises(UserError) as caught:
        begin(folder).import_sheet(path)
    assert str(caught.value).count(message) >= 1
    assert f"{path}:{lines[0]}: " in str(caught.value)
    assert _kept(folder) == before


def test_import_refuses_a_repeated_item(folder: Path) -> None:
    path, rows = _export(folder)
    _save(path, [*rows, {**rows[0], "verdict": "A"}])
    with pytest.raises(UserError, match=r"duplicate of line 2"):
        begin(folder).import_sheet(path)


def test_import_refuses_a_sheet_of_another_evaluation(folder: Path, tmp_path: Path) -> None:
    path, _ = _export(folder)
    items = make_items(120, tuned=0.7, retrieved=0.3)
    other = save(tmp_path / "other", items, make_evidence(items).model_copy(update={"id": "ffffffffffff"}))
    with pytest.raises(UserError, match="The sheet belongs to evaluation 0123456789ab, not to ffffffffffff"):
        begin(other).import_sheet(path)
    assert not (other / "human-eval").exists()


def test_export_omits_judged_pairs(folder: Path) -> None:
    review = begin(folder, items=12)
    for key in review.open_keys()[:11]:
        review.answer(review.item(key), "A")
    _, rows = _export(folder, items=12)
    assert [row["item"] for row in rows] == review.open_keys()
    review.answer(review.item(rows[0]["item"]), "B")
    with pytest.raises(UserError, match="has judged all pairs"):
        begin(folder).export_sheet(folder / "again.csv")
