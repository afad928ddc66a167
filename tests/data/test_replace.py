"""Corrected labels: `data add --replace` replaces the dataset's outputs by a file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, Pair, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.remove import remove
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import VerdictEvent, append_reviews
from tunewright.data.trace import blame, find_row
from tunewright.data.verify import verify
from tunewright.data.versions import load_version
from tunewright.data.versions.diff import diff


def _add(
    project: ProjectFolder, pairs: list[Pair], name: str = "pairs.jsonl", **options: Any
) -> tuple[AddResult, Listener]:
    listener = Listener()
    return add(project, [write_jsonl(project.root / name, pairs)], listener, AddOptions(**options)), listener


def _answers(project: ProjectFolder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for member in load_version(project.dataset).members:
        found.setdefault(member.example.input_text, []).append(member.example.output)
    return found


@examples(15)
@given(seed=st.integers(0, 1000), changed=st.sets(st.integers(0, 39), min_size=1))
def test_replace_changes_outputs_and_keeps_splits(
    tmp_path_factory: pytest.TempPathFactory, seed: int, changed: set[int]
) -> None:
    project = new_project(tmp_path_factory.mktemp("replace") / "p")
    pairs = unlike_pairs(40, seed)
    _add(project, pairs)
    before = load_version(project.dataset)
    corrected = [(text, f"corrected {i}" if i in changed else answer) for i, (text, answer) in enumerate(pairs)]
    result, _ = _add(project, corrected, "corrected.jsonl", replace=True)
    after = load_version(project.dataset)
    assert (len(result.replaced), result.added, result.known) == (len(changed), 0, 40 - len(changed))
    assert _answers(project) == {text: [answer] for text, answer in corrected}
    splits = [{m.example.input_text: m.split for m in version.members} for version in (before, after)]
    assert splits[0] == splits[1]
    assert len(diff(before, after).edited) == len(changed)
    assert verify(OpenFolder(project, Listener())).ok
    # The old file changes nothing, and neither does the new one.
    for rows, name, gone in ((pairs, "pairs.jsonl", len(changed)), (corrected, "corrected.jsonl", 0)):
        again, _ = _add(project, rows, name)
        assert (again.created, again.known, len(again.superseded)) == (False, 40 - gone, gone)


def test_replace_reports_both_outputs_and_blame_finds_its_line(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = unlike_pairs(40)
    _add(project, pairs)
    result, listener = _add(project, [("  " + pairs[3][0].upper(), "corrected")], "corrected.jsonl", replace=True)
    [row] = result.replaced
    assert (row.line, row.output, row.outputs_before) == (1, "corrected", ("answer 3",))
    assert any('corrected.jsonl:1: "answer 3" → "corrected"' in said for said in listener.said)
    version = load_version(project.dataset)
    found = blame(project.dataset, version, row.key)
    assert (found.source, found.line) == ("corrected.jsonl", 1)
    assert find_row(project.dataset, version, "pairs.jsonl:4").key == row.key


@pytest.mark.parametrize("purge", [False, True])
def test_find_row_reports_a_removed_replacement(tmp_path: Path, purge: bool) -> None:
    project = new_project(tmp_path / "p")
    [(question, _), *others] = unlike_pairs(60)
    _add(project, [(question, "old"), *others])
    _add(project, [(question, "new")], "corrected.jsonl", replace=True)
    remove(OpenFolder(project, Listener()), RemoveOptions(because="ACME asked", where="output == 'new'", purge=purge))
    for place in ("pairs.jsonl:1", "corrected.jsonl:1"):
        with pytest.raises(UserError, match="The row was removed: ACME asked"):
            find_row(project.dataset, load_version(project.dataset), place)


@pytest.mark.parametrize("rows", [None, "data"])
def test_find_row_finds_rows_of_a_one_line_document_by_number(tmp_path: Path, rows: str | None) -> None:
    project = new_project(tmp_path / "p", f"data: {{rows: {rows}}}\n" if rows else "")
    pairs = [{"prompt": question, "completion": answer} for question, answer in unlike_pairs(30)]
    path = project.root / "rows.json"
    path.write_text(json.dumps({rows: pairs} if rows else pairs))
    listener = Listener()
    add(project, [path], listener)
    assert any("places are row numbers" in said for said in listener.said)
    for number in (1, 17, 30):
        member = find_row(project.dataset, load_version(project.dataset), f"rows.json:{number}")
        assert member.example.input_text == pairs[number - 1]["prompt"]
    dry = remove(OpenFolder(project, Listener()), RemoveOptions(because="", where="line == `17`", dry_run=True))
    assert [row.document["input"] for row in dry.rows] == [pairs[16]["prompt"]]
    conflict = [pairs[2], {**pairs[2], "completion": "another"}]
    path.write_text(json.dumps({rows: conflict} if rows else conflict))
    with pytest.raises(UserError, match=r"rows\.json:2\)"):
        add(project, [path], Listener())


LONG = "SELECT CITYalias0.CITY_NAME FROM CITY AS CITYalias0 WHERE CITYalias0.POPULATION > 150000 AND "


def test_messages_show_long_outputs_at_their_difference(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    [(question, _), *others] = unlike_pairs(30)
    _add(project, [(question, f"{LONG}STATE_NAME = 'texas'"), *others])
    corrected = (question, f"{LONG}STATE_NAME = 'ohio'")
    with pytest.raises(UserError, match="with different outputs") as caught:
        _add(project, [corrected], "corrected.jsonl")
    apart = "STATE_NAME = 'texas'\"", "STATE_NAME = 'ohio'\""
    assert all(text in caught.value.what for text in apart)
    _, listener = _add(project, [corrected], "corrected.jsonl", replace=True)
    [reported] = [said for said in listener.said if "1 row replaced" in said]
    assert all(text in reported for text in apart)


def test_replace_keeps_the_spelling_of_the_input(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = unlike_pairs(40)
    _add(project, pairs)
    before = load_version(project.dataset)
    other = [(f"  {text.upper()}", f"corrected {i}") for i, (text, _) in enumerate(pairs)]
    result, listener = _add(project, other, "corrected.jsonl", replace=True)
    after = load_version(project.dataset)
    assert (result.added, len(result.replaced)) == (0, 40)
    assert _answers(project) == {text: [f"corrected {i}"] for i, (text, _) in enumerate(pairs)}
    changes = diff(before, after)
    assert (len(changes.edited), len(changes.added), len(changes.removed)) == (40, 0, 0)
    tested = result.version.counts.test
    assert f"{tested} test rows were replaced: scores of the two versions are not comparable." in listener.warned
    assert verify(OpenFolder(project, Listener())).ok
    again, _ = _add(project, other, "corrected.jsonl", replace=True)
    assert (again.created, again.replaced) == (False, ())


def test_replace_keeps_a_reviewers_edit_under_another_spelling(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = unlike_pairs(40)
    _add(project, pairs)
    row = next(m for m in load_version(project.dataset).members if m.example.output == "answer 3")
    when = "2026-11-25T10:00:00.000+00:00"
    edit = VerdictEvent(key=row.key, verdict="edit", output="reviewed", version="0" * 64, reviewer="ada", when=when)
    append_reviews(project.dataset, [edit])
    apply_edits(project, Listener())
    result, listener = _add(project, [(pairs[3][0].upper(), "answer 3")], "corrected.jsonl", replace=True)
    assert (result.created, result.replaced) == (False, ())
    assert any("a reviewer edited the answer" in warned for warned in listener.warned)


_REFERENCES = [("one place by the river", f"reference {i}") for i in range(7)]


def _with_references(folder: Path) -> ProjectFolder:
    project = new_project(folder, "data: {conflicts: accept}\n")
    _add(project, [*unlike_pairs(40), *_REFERENCES])
    return project


_CORRECTED = [("one place by the river", "corrected"), *_REFERENCES[1:]]


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        (_REFERENCES[:1], "7 in the version, 1 here"),
        (_REFERENCES[:6], "7 in the version, 6 here"),
        (_CORRECTED, "7 in the version, 7 here"),
        ([(unlike_pairs(40)[3][0], answer) for answer in ("one", "two")], "1 in the version, 2 here"),
    ],
)
def test_replace_refuses_another_set_of_several_outputs(tmp_path: Path, given: list[Pair], counts: str) -> None:
    project = _with_references(tmp_path / "p")
    before = load_version(project.dataset).digest
    with pytest.raises(UserError) as caught:
        _add(project, given, "corrected.jsonl", replace=True)
    assert caught.value.where == "--replace"
    assert "corrected.jsonl:1" in caught.value.what and counts in caught.value.what
    assert load_version(project.dataset).digest == before


def test_replace_changes_nothing_when_outputs_are_equal(tmp_path: Path) -> None:
    project = _with_references(tmp_path / "p")
    result, _ = _add(project, _REFERENCES, "again.jsonl", replace=True)
    assert (result.created, result.known, result.replaced) == (False, 7, ())


def test_restore_adds_superseded_rows(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {conflicts: accept}\n")
    pairs = unlike_pairs(40)
    _add(project, pairs)
    _add(project, [(pairs[0][0], "corrected")], "corrected.jsonl", replace=True)
    left_out, listener = _add(project, pairs)
    assert (left_out.created, left_out.known, left_out.superseded) == (False, 39, (f"{project.root}/pairs.jsonl:1",))
    assert any("1 row left out, superseded by --replace earlier. --restore" in said for said in listener.said)
    back, listener = _add(project, pairs, restore=True)
    assert (back.added, back.superseded) == (1, ())
    assert not any("Nothing to restore" in said for said in listener.said)
    assert sorted(_answers(project)[pairs[0][0]]) == ["answer 0", "corrected"]


def test_replacing_row_gets_the_groups(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {group_by: [customer]}\n")
    rows = [{"prompt": p, "completion": c, "customer": f"C{i}"} for i, (p, c) in enumerate(unlike_pairs(40))]
    path = write_rows(project.root / "pairs.jsonl", rows)
    add(project, [path], Listener())
    path.write_text(json.dumps({**rows[3], "completion": "corrected", "customer": None}) + "\n")
    add(project, [path], Listener(), AddOptions(replace=True))
    corrected = next(m for m in load_version(project.dataset).members if m.example.output == "corrected")
    assert corrected.groups == ("customer=C3",)
