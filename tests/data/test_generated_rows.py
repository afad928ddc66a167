"""Generated rows: only trained on until a person accepts them, first in review, and never instead of people's rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.remove import remove
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.session import ReviewItem, ReviewSession
from tunewright.data.trace import find_row
from tunewright.data.verify import verify
from tunewright.data.versions import DatasetVersion, Member, load_version

PEOPLE = unlike_pairs(40, seed=3)
ABOUT = {"teacher": "big", "samples": 3, "agreement": 0.6667}
REASON = "a reason"


def chat(prompt: str, completion: str, **keys: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"messages": messages, "generated": ABOUT, **keys}


def write(project: ProjectFolder, rows: Sequence[Any]) -> Path:
    return write_rows(project.root / "generated.jsonl", rows)


def add_generated(project: ProjectFolder, *rows: Any, listener: Listener | None = None, **options: Any) -> AddResult:
    return add(project, [write(project, rows)], listener or Listener(), AddOptions(**options))


def started(root: Path, config: str = "data: {conflicts: accept}\n") -> ProjectFolder:
    project = new_project(root, config)
    add(project, [write_jsonl(root / "pairs.jsonl", PEOPLE)], Listener())
    return project


def current(project: ProjectFolder) -> DatasetVersion:
    return load_version(project.dataset)


def member(project: ProjectFolder, text: str) -> Member | None:
    return next((m for m in current(project).members if m.example.input_text == text), None)


def held_out(project: ProjectFolder, split: str = "test") -> Member:
    return next(m for m in current(project).members if m.split == split)


def session(project: ProjectFolder, reviewer: str = "ada") -> ReviewSession:
    return ReviewSession(project.dataset, current(project), reviewer, Listener())


def judge(project: ProjectFolder, row: Member, verdict: Any, output: str | None = None) -> None:
    session(project).judge(ReviewItem(row, 1), verdict, output)


def test_generated_rows_are_trained_on_and_leave_the_shares_of_people_alone(tmp_path: Path) -> None:
    project = new_project(tmp_path, "")
    rows = [chat(text, answer) for text, answer in unlike_pairs(200, seed=9)]
    add(project, [write_jsonl(tmp_path / "pairs.jsonl", PEOPLE), write(project, rows)], Listener())
    version = current(project)
    written = [m for m in version.members if m.generated]
    assert len(written) == 200
    assert {m.split for m in written} == {"train"}
    assert {split: len(version.examples(split)) for split in ("dev", "test")} == {"dev": 4, "test": 4}
    assert verify(OpenFolder(project, Listener())).ok


def test_generated_rows_alone_make_no_dataset(tmp_path: Path) -> None:
    project = new_project(tmp_path, "")
    with pytest.raises(UserError, match="without 30 generated rows that nobody has accepted"):
        add_generated(project, *(chat(text, answer) for text, answer in unlike_pairs(30)))


@pytest.mark.parametrize("split", ["test", "dev"])
def test_unaccepted_rows_near_a_held_out_one_are_left_out_by_name(tmp_path: Path, split: str) -> None:
    project, listener = started(tmp_path), Listener()
    near = f"{held_out(project, split).example.input_text}!"
    result = add_generated(project, chat(near, "x"), chat("something quite different here 1", "y"), listener=listener)
    assert (result.added, result.unaccepted) == (1, 1)
    assert any("1 generated row left out: nobody has accepted them" in warning for warning in listener.warned)
    assert any(f"{project.root}/generated.jsonl:1" in warning for warning in listener.warned)
    assert member(project, near) is None
    assert [m for m in current(project).members if m.generated and m.split != "train"] == []
    with pytest.raises(UserError, match="nobody has accepted it"):
        find_row(project.dataset, current(project), "generated.jsonl:1")


def test_a_row_near_a_held_out_one_leaves_alone_and_its_document_stays(tmp_path: Path) -> None:
    project = started(tmp_path)
    near, passage = f"{held_out(project).example.input_text}!", {"document": "d1"}
    rows = [chat(near, "x", passage=passage), chat("quite another question 17", "y", passage=passage)]
    assert add_generated(project, *rows).unaccepted == 1
    assert member(project, near) is None
    assert member(project, "quite another question 17") is not None


def test_a_document_with_an_accepted_held_out_row_takes_in_no_other(tmp_path: Path) -> None:
    project = started(tmp_path)
    row = accepted_test_row(project, passage={"document": "d1"})
    assert row.groups == ("source_document=d1",)
    add_generated(project, chat("quite another question 17", "y", passage={"document": "d1"}))
    assert member(project, "quite another question 17") is None


def test_an_unaccepted_row_leaves_when_a_persons_row_links_it_to_a_held_out_one(tmp_path: Path) -> None:
    project = loosened(started(tmp_path), 0.5)
    words = held_out(project).example.input_text.split()
    far = " ".join([*words[:-4], "zulu", "yankee", "xray", "whisky"])
    between = " ".join([*words[:-2], "xray", "whisky"])
    add_generated(project, chat(far, "x"))
    assert member(project, far) is not None
    add(project, [write_jsonl(tmp_path / "more.jsonl", [(between, "y")])], Listener())
    linking = member(project, between)
    assert linking is not None and linking.split == "test"
    assert member(project, far) is None


def accepted_test_row(project: ProjectFolder, **keys: Any) -> Member:
    """A generated row that a person accepted, before a person's row linked it to a test row."""
    text = "an input like no other one of all these 99"
    add_generated(project, chat(text, "x", **keys))
    row = member(project, text)
    assert row is not None
    judge(project, row, "right")
    bridge = f"{held_out(project).example.input_text} {text}"
    add(loosened(project, 0.3), [write_jsonl(project.root / "more.jsonl", [(bridge, "y")])], Listener())
    joined = member(project, text)
    assert joined is not None
    return joined


def loosened(project: ProjectFolder, threshold: float) -> ProjectFolder:
    data = project.config.data.model_copy(update={"dedup_threshold": threshold})
    return ProjectFolder(project.root, project.config.model_copy(update={"data": data}))


def test_accepted_rows_may_join_a_held_out_cluster(tmp_path: Path) -> None:
    assert accepted_test_row(started(tmp_path)).split == "test"


def test_a_persons_file_with_the_same_pair_makes_it_a_persons_row(tmp_path: Path) -> None:
    project = new_project(tmp_path, "")
    same, edited = PEOPLE[0], ("a new question of a model 17", "an answer")
    rows = [chat(*same), chat(*edited)]
    add(project, [write(project, rows), write_jsonl(tmp_path / "pairs.jsonl", PEOPLE)], Listener())
    people = [m for m in current(project).members if not m.generated]
    assert len(people) == len(PEOPLE)
    add(project, [write_jsonl(tmp_path / "again.jsonl", [edited])], Listener())
    row = member(project, edited[0])
    assert row is not None
    assert row.generated


def test_generated_rows_are_read_whatever_form_the_projects_own_files_have(tmp_path: Path) -> None:
    config = (
        'data: {input: "{{ a }} of {{ b }}", output: "{{ c }}", group_by: [b], drop_columns: [generated], '
        "system_prompt: Be brief.}\n"
    )
    project = new_project(tmp_path, config)
    own = [{"a": text, "b": f"g{n}", "c": answer} for n, (text, answer) in enumerate(PEOPLE)]
    people = write_rows(tmp_path / "own.jsonl", own)
    passage = {"document": "d1", "quote": "q"}
    add(
        project,
        [people, write(project, [chat("a question 1", "x", b="g1"), chat("another 22", "y", passage=passage)])],
        Listener(),
    )
    found = {m.example.input_text: m for m in current(project).members if m.generated}
    assert found.keys() == {"a question 1", "another 22"}
    assert found["a question 1"].groups == ("b=g1",)
    assert found["another 22"].groups == ("source_document=d1",)


def test_generated_rows_cannot_replace_held_out_rows_of_people(tmp_path: Path) -> None:
    project = started(tmp_path)
    row = held_out(project)
    before = current(project).digest
    with pytest.raises(UserError, match="1 generated row would replace rows of dev or test"):
        add_generated(project, chat(row.example.input_text, "another answer"), replace=True)
    assert current(project).digest == before


def test_review_shows_generated_rows_first_and_the_sample_after_them(tmp_path: Path) -> None:
    project = started(tmp_path)
    texts = [f"a generated question {n} {n * 7919}" for n in range(5)]
    add_generated(project, *(chat(text, "x") for text in texts))
    version = current(project)
    metadata = {m.key: {"generated": ABOUT} for m in version.members if m.generated}
    review = ReviewSession(project.dataset, version, "ada", Listener(), metadata=metadata)
    shown = []
    for number in range(5):
        card = review.next()
        assert card is not None
        assert card.why == "generated: by big, agreement 67% of 3 samples"
        assert review.status.startswith(f"generated rows: {number} of 5 reviewed; ")
        review.judge(card, "right" if number else "wrong")
        shown.append(card.member.example.input_text)
    assert sorted(shown) == texts
    card = review.next()
    assert card is not None
    assert not card.member.generated
    again = session(project)
    assert len(again.generated) == 1, "accepted rows are reviewed with the others"
    assert [again.members[key].generated for key in again.open_keys(3)] == [False] * 3


@pytest.mark.parametrize("command", ["add", "remove", "apply"])
def test_a_withdrawn_acceptance_takes_the_row_out_of_the_next_version(tmp_path: Path, command: str) -> None:
    project, listener = started(tmp_path), Listener()
    row = accepted_test_row(project)
    judge(project, row, "wrong")
    person = next(m for m in current(project).members if m.split == "train" and not m.generated)
    if command == "add":
        add(project, [write_jsonl(tmp_path / "new.jsonl", [("a new row of people 1", "y")])], listener)
    elif command == "remove":
        keys = tmp_path / "keys.txt"
        keys.write_text(f"{person.key}\n", encoding="utf-8")
        remove(OpenFolder(project, listener), RemoveOptions(because=REASON, keys=keys))
    else:
        judge(project, person, "edit", "a better answer")
        apply_edits(project, listener)
    assert member(project, row.example.input_text) is None
    assert any("1 generated row" in warning and "left out" in warning for warning in listener.warned)


# Each family is a row of people and near-duplicates of it, which models wrote.
FAMILIES = [
    (text, [f"zulu {text.partition(' ')[2]}", f"{text.rpartition(' ')[0]} xray"])
    for text, _ in unlike_pairs(30, seed=5)
]
STEP = st.one_of(
    st.tuples(st.just("people"), st.integers(12, 29)),
    st.tuples(st.just("generated"), st.integers(0, 29)),
    st.tuples(st.sampled_from(["right", "wrong", "undo", "edit", "apply", "remove", "both"]), st.integers(0, 29)),
)


@examples(60, quick=6)
@given(steps=st.lists(STEP, min_size=3, max_size=10))
def test_no_version_holds_out_a_generated_row_that_nobody_accepted(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = new_project(Path(folder) / "p", "data: {conflicts: accept, test_size: 0.3, dedup_threshold: 0.5}\n")
        add(project, [write_jsonl(project.root / "p.jsonl", [(text, "a") for text, _ in FAMILIES[:12]])], Listener())
        accepted: dict[str, list[str]] = {}  # the verdicts on each key, latest last
        edits: set[str] = set()
        before = current(project).digest
        for action, number in steps:
            text, near = FAMILIES[number]
            generated = [m for m in current(project).members if m.generated]
            row = generated[number % len(generated)] if generated else None
            try:
                if action in ("people", "both"):
                    pairs = [(text, "a")]
                    files = [write_jsonl(project.root / "p.jsonl", pairs)]
                    files += [write(project, [chat(each, "b") for each in near])] if action == "both" else []
                    add(project, files, Listener())
                elif action == "generated":
                    add_generated(project, *(chat(each, "b") for each in near))
                elif row is None:
                    continue
                elif action in ("right", "wrong"):
                    judge(project, row, action)
                    accepted.setdefault(row.key, []).append(action)
                elif action == "edit":
                    judge(project, row, "edit", f"edited {number} {len(accepted)} {len(edits)}")
                    accepted.setdefault(row.key, []).append("edit")
                elif action == "undo":
                    undone = session(project).undo()
                    if undone is not None:
                        accepted[undone.member.key].pop()
                elif action == "apply":
                    result = apply_edits(project, Listener())
                    edits |= {edit.now for edit in result.edited}
                else:
                    keys = project.root / "keys.txt"
                    keys.write_text(f"{row.key}\n", encoding="utf-8")
                    remove(OpenFolder(project, Listener()), RemoveOptions(because=REASON, keys=keys))
            except UserError:
                continue
            version = current(project)
            if version.digest == before:
                continue
            before = version.digest
            for each in version.members:
                if each.generated and each.split != "train":
                    last = (accepted.get(each.key) or [""])[-1]
                    assert last == "right" or (each.key in edits and last == "")


def test_folds_never_hold_out_a_generated_row(tmp_path: Path) -> None:
    from tunewright.evaluation.folds import fold_versions

    project = started(tmp_path)
    accepted_test_row(project)
    add_generated(project, *(chat(text, answer) for text, answer in unlike_pairs(20, seed=9)))
    version = current(project)
    folds = fold_versions(version, 4, 0)
    people = {m.key for m in version.domain if not m.generated}
    tested = [m.key for fold in folds for m in fold.examples("test")]
    assert sorted(tested) == sorted(people)
    for fold in folds:
        held_out = {m.cluster for m in fold.members if m.split != "train"}
        assert all(m.split == "train" and m.cluster not in held_out for m in fold.members if m.generated)
        assert sum(m.generated for m in fold.members) >= 20
