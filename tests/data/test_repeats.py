"""Rows that repeat another: exact duplicates are left out, near-duplicates are kept, clustered and counted."""

from __future__ import annotations

import json
from pathlib import Path

from data_helpers import Listener, example, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_settings import examples
from tunewright.config.project import ProjectFolder
from tunewright.data.add import AddResult, add
from tunewright.data.dedup import Repeat, cluster_counts, exact_repeats
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import VerdictEvent, append_reviews
from tunewright.data.versions import load_version, version_folder

THIRTY_TWO = "patient is 32 weeks pregnant and has been bleeding since monday evening"
THIRTY_FOUR = THIRTY_TWO.replace("32", "34")


def _add(project: ProjectFolder, *pairs: tuple[str, str], name: str = "pairs.jsonl") -> tuple[AddResult, Listener]:
    listener = Listener()
    return add(project, [write_jsonl(project.root / name, pairs)], listener), listener


def test_near_duplicates_are_kept_in_one_cluster_and_counted(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    result, listener = _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "urgent"))
    version = load_version(project.dataset)
    assert (result.added, result.duplicates, result.version.counts.near_duplicates) == (22, (), 1)
    pair = [m for m in version.members if m.example.output == "urgent"]
    assert len(pair) == 2
    assert len({m.cluster for m in pair}) == len({m.split for m in pair}) == 1
    assert cluster_counts(version, pair[0]) == (2, 2)
    [kept] = result.near_duplicates
    assert {kept.line, int(kept.of_place.rpartition(":")[2])} == {21, 22}
    assert any("1 near-duplicate kept" in said and "data.duplicates: drop" in said for said in listener.said)
    assert version.manifest.settings.duplicates == "keep"
    imports = version_folder(project.dataset, version.digest) / "imports.jsonl"
    records = [json.loads(line) for line in imports.read_text().splitlines()]
    assert [(r["fate"], r["near"]) for r in records if "near" in r] == [("added", kept.of)]


def test_near_duplicates_are_dropped_on_request(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {duplicates: drop}\n")
    result, _ = _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "urgent"))
    assert (result.added, len(result.duplicates), result.near_duplicates) == (21, 1, ())
    assert (result.version.counts.near_duplicates, result.version.settings.duplicates) == (0, "drop")


def test_near_duplicate_count_survives_a_change_to_drop(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "urgent"))
    (project.root / "tunewright.yaml").write_text("data: {duplicates: drop}\n")
    thirty_six = THIRTY_TWO.replace("32", "36")
    result, _ = _add(ProjectFolder(project.root), *unlike_pairs(5, seed=3), (thirty_six, "urgent"), name="more.jsonl")
    assert (result.version.counts.near_duplicates, len(result.duplicates)) == (1, 1)


def test_near_duplicate_from_an_edit_is_counted(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    result, _ = _add(project, *unlike_pairs(20), (THIRTY_TWO, "urgent"), (THIRTY_FOUR, "can wait"))
    assert result.version.counts.near_duplicates == 0
    row = next(m for m in load_version(project.dataset).members if m.example.output == "can wait")
    when = "2026-11-25T10:00:00+00:00"
    edit = VerdictEvent(key=row.key, verdict="edit", output="urgent", version="0" * 64, reviewer="ada", when=when)
    append_reviews(project.dataset, [edit])
    assert apply_edits(project, Listener()).version.counts.near_duplicates == 1


def test_exact_duplicates_ignore_case_and_white_space_of_inputs() -> None:
    rows = [
        example("Capital  of Australia", "Canberra"),
        example("capital of australia", "Canberra "),
        example("capital of australia", "canberra"),
        example("capital of australia", "Canberra", system="Answer in French."),
        example("capitals of australia", "Canberra"),
        example("aaaaa", "b"),
        example("aaaaaa", "b"),
    ]
    assert exact_repeats(rows, 0) == {1: Repeat(0, 1.0)}
    assert exact_repeats(rows, 2) == {}


@examples(50)
@given(st.lists(st.tuples(st.sampled_from(["a b", "A  b", "a c", "b"]), st.sampled_from(["x", " x", "y"]))))
def test_exact_repeats_are_complete_and_correct(pairs: list[tuple[str, str]]) -> None:
    rows = [example(text, output) for text, output in pairs]
    gone = exact_repeats(rows, 0)
    stay = [(" ".join(t.split()).casefold(), o.strip()) for i, (t, o) in enumerate(pairs) if i not in gone]
    assert len(stay) == len(set(stay))
    assert all(repeat.of < row and repeat.of not in gone for row, repeat in gone.items())
    assert all((" ".join(pairs[i][0].split()).casefold(), pairs[i][1].strip()) in stay for i in gone)
