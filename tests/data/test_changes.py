"""Differences between versions, origins of rows, and the adapters that used them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.examples import Example
from tunewright.data.splits import SPLITS
from tunewright.data.trace import blame, uses_of_row
from tunewright.data.versions import (
    DatasetVersion,
    Member,
    keys_digest,
    load_version,
    locked,
    members_digest,
    save_version,
    version_folder,
)
from tunewright.data.versions.diff import diff, diff_text, marked, word_changes

FIRST = unlike_pairs(60, seed=1)
ACCEPTING = {"conflicts": "accept"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with one version of 60 rows; tests work on copies."""
    project = new_project(tmp_path_factory.mktemp("pristine") / "p")
    add(project, [write_jsonl(project.root.parent / "first.jsonl", FIRST)], Listener(), message="first")
    return project


@pytest.fixture
def project(pristine: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    return ProjectFolder(Path(shutil.copytree(pristine.root, tmp_path / "p")))


def _with_output(member: Member, output: str) -> Member:
    """The row with another ideal output."""
    example = Example((*member.example.prompt, replace(member.example.messages[-1], content=output)))
    return replace(member, example=example, key=example.pair_key)


def _next_version(
    project: ProjectFolder,
    change: Callable[[Member], Member | None],
    imports: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> DatasetVersion:
    """Make a version of the current one by changing each row, or leaving it out (None), and make it current."""
    parent = load_version(project.dataset)
    members = [changed for m in parent.members if (changed := change(m)) is not None]
    names = {m.cluster: m.cluster for m in members}
    for member in members:
        names[member.cluster] = min(m.key for m in members if m.cluster == member.cluster)
    members = [replace(m, cluster=names[m.cluster]) for m in members]
    manifest = parent.manifest.model_copy(
        update={
            "digest": members_digest(members),
            "parent": parent.digest,
            "splits": {split: keys_digest(m.key for m in members if m.split == split) for split in SPLITS},
            **facts,
        }
    )
    with locked(project.dataset):
        save_version(project.dataset, manifest, members, imports, Listener())
    return load_version(project.dataset)


def _of(version: DatasetVersion, split: str, count: int = 1) -> list[Member]:
    return [m for m in version.members if m.split == split][:count]


def _add(project: ProjectFolder, *pairs: tuple[str, str]) -> DatasetVersion:
    """Conflicts included."""
    config = project.config
    project = ProjectFolder(project.root, config.model_copy(update={"data": config.data.model_copy(update=ACCEPTING)}))
    add(project, [write_jsonl(project.root.parent / "more.jsonl", pairs)], Listener(), message="more")
    return load_version(project.dataset)


def test_diff_distinguishes_added_removed_edited_and_moved_rows(project: ProjectFolder) -> None:
    a = load_version(project.dataset)
    gone, edited, moved = _of(a, "train", 3)
    other = _with_output(edited, "another answer")

    def change(member: Member) -> Member | None:
        if member.key == moved.key:
            return Member(member.example, member.key, "dev", member.cluster)
        return {gone.key: None, edited.key: other}.get(member.key, member)

    b = _next_version(project, change)
    there, back = diff(a, b), diff(b, a)
    assert [m.key for m in there.removed] == [gone.key]
    assert [(e.before.key, e.after.key) for e in there.edited] == [(edited.key, other.key)]
    assert [(m.member.key, m.before, m.member.split) for m in there.moved] == [(moved.key, "train", "dev")]
    assert there.added == ()
    assert [m.key for m in back.added] == [gone.key]
    assert [(e.before.key, e.after.key) for e in back.edited] == [(other.key, edited.key)]
    assert there.comparable


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_diff_is_comparable_unless_a_test_row_changes(project: ProjectFolder, split: str) -> None:
    a = load_version(project.dataset)
    row = _of(a, split)[0]
    b = _next_version(project, lambda m: _with_output(m, "edited") if m.key == row.key else m)
    found = diff(a, b)
    assert found.comparable == (split != "test")
    assert found.test_rows_changed == (split == "test")
    assert found.as_dict()["comparable"] == found.comparable
    words = "1 test row changed" if split == "test" else "0 test rows changed: scores stay comparable"
    assert words in diff_text(found)


def test_diff_is_not_comparable_when_a_row_enters_or_leaves_test(project: ProjectFolder) -> None:
    a = load_version(project.dataset)
    out, into = _of(a, "test")[0], _of(a, "train")[0]
    swap = {out.key: "train", into.key: "test"}
    b = _next_version(project, lambda m: Member(m.example, m.key, swap.get(m.key, m.split), m.cluster))  # type: ignore[arg-type]
    assert diff(a, b).test_rows_changed == 2


def test_diff_pairs_only_changed_outputs_of_one_input(project: ProjectFolder) -> None:
    a = _add(project, ("one question", "yes"), ("one question", "no"))
    yes = next(m for m in a.members if m.example.output == "yes")
    b = _next_version(project, lambda m: _with_output(m, "maybe") if m.key == yes.key else m)
    found = diff(a, b)
    assert [(e.before.example.output, e.after.example.output) for e in found.edited] == [("yes", "maybe")]
    assert (found.added, found.removed) == ((), ())


def test_diff_reports_changed_settings_and_sources(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {dedup_threshold: 0.8}\n")
    add(project, [write_jsonl(tmp_path / "first.jsonl", FIRST)], Listener())
    a = load_version(project.dataset)
    project = ProjectFolder(project.root, project.config.model_copy(update={"seed": 7}))
    b = _add(project, *unlike_pairs(20, seed=2))
    found = diff(a, b)
    assert found.metadata["settings.seed"] == (0, 7)
    assert "settings.dedup_threshold" not in found.metadata
    assert [s["name"] for s in found.metadata["sources"][1]] == ["more.jsonl"]
    text = diff_text(found)
    assert "settings.seed: 0 → 7" in text
    assert "more.jsonl" in text


@given(before=st.text(max_size=60), after=st.text(max_size=60))
def test_word_changes_contain_both_texts(before: str, after: str) -> None:
    pieces = word_changes(before, after)
    assert "".join(text for mark, text in pieces if mark != "new") == before
    assert "".join(text for mark, text in pieces if mark != "gone") == after
    assert all(text for _, text in pieces)


def test_marked_marks_changed_words_and_cuts_distant_text() -> None:
    assert marked("the court of Polk County", "the court of Lee County") == "the court of [-Polk-]{+Lee+} County"
    assert marked("same", "same") == "same"
    long = "word " * 200
    text = marked(f"{long}old {long}", f"{long}new {long}")
    assert "[-old-]{+new+}" in text
    assert text.startswith("…")
    assert text.endswith("…")
    assert len(text) < 200
    assert f"({len('x' * 900):,} characters)" in marked("a", "x" * 900)


def test_blame_returns_the_import_of_a_row(project: ProjectFolder) -> None:
    first = load_version(project.dataset)
    second = _add(project, *unlike_pairs(20, seed=2))
    old, new = first.members[0], next(m for m in second.members if m.key not in {n.key for n in first.members})
    found = blame(project.dataset, second, old.key)
    assert found.version.digest == first.digest
    assert (found.version.message, found.source) == ("first", "first.jsonl")
    asked, _ = FIRST[(found.line or 0) - 1]
    assert asked == old.example.input_text
    found = blame(project.dataset, second, new.key)
    assert (found.version.digest, found.source) == (second.digest, "more.jsonl")
    assert found.version.author
    assert (found.edit_of, found.conflicts_with, found.older_missing) == ((), (), None)
    assert found.version.message == "more"


def test_blame_returns_the_row_before_an_edit(project: ProjectFolder) -> None:
    first = load_version(project.dataset)
    row = first.members[5]
    other = _with_output(row, "better")
    record: dict[str, Any] = {"fate": "edited", "key": other.key, "before": row.key, "reviewers": ["Ada"]}
    record |= {"source": "dataset/reviews.jsonl", "line": 3}
    second = _next_version(project, lambda m: other if m.key == row.key else m, [record], message="review")
    third = _add(project, *unlike_pairs(20, seed=2))
    found = blame(project.dataset, third, other.key)
    assert found.version.digest == second.digest
    assert found.edit_of == (row.key,)
    assert (found.source, found.line, found.reviewers) == ("dataset/reviews.jsonl", 3, ("Ada",))


def test_blame_distinguishes_conflicts_from_edits(project: ProjectFolder) -> None:
    row = load_version(project.dataset).members[5]
    version = _add(project, (row.example.input_text, "quite another answer"))
    other = next(m for m in version.members if m.example.output == "quite another answer")
    found = blame(project.dataset, version, other.key)
    assert (found.edit_of, found.conflicts_with) == ((), (row.key,))


def test_blame_returns_the_version_that_restored_a_row(project: ProjectFolder) -> None:
    row = load_version(project.dataset).members[5]
    _next_version(project, lambda m: None if m.key == row.key else m)
    version = _add(project, (row.example.input_text, row.example.output), *unlike_pairs(5, seed=3))
    assert blame(project.dataset, version, row.key).version.digest == version.digest


def test_blame_returns_the_missing_parent(project: ProjectFolder) -> None:
    first = load_version(project.dataset)
    second = _add(project, *unlike_pairs(20, seed=2))
    shutil.rmtree(version_folder(project.dataset, first.digest))
    assert blame(project.dataset, second, first.members[0].key).older_missing == first.digest


def test_blame_refuses_an_unknown_row(project: ProjectFolder) -> None:
    with pytest.raises(UserError, match="has no row 'abc'"):
        blame(project.dataset, load_version(project.dataset), "abc")


def _adapter(project: ProjectFolder, name: str, lineage: Any) -> None:
    folder = project.adapters / name
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text(lineage if isinstance(lineage, str) else json.dumps(lineage))


def _lineage(version: DatasetVersion, *left_out: str) -> dict[str, Any]:
    rendering = {"train": {"left_out": [{"key": key, "tokens": 3000} for key in left_out]}}
    return {"dataset": {"digest": version.digest}, "rendering": rendering}


def test_uses_of_row_lists_the_adapters_of_a_row(project: ProjectFolder) -> None:
    first = load_version(project.dataset)
    second = _add(project, *unlike_pairs(20, seed=2))
    new = next(m for m in second.examples("train") if m.key not in {n.key for n in first.members})
    _adapter(project, "a-one", _lineage(first))
    _adapter(project, "b-two", _lineage(second))
    _adapter(project, "c-cut", _lineage(second, new.key))
    _adapter(project, "d-gone", {"dataset": {"digest": "0" * 64}})
    _adapter(project, "e-foreign", {})
    _adapter(project, "f-old", {"dataset": {"digest": second.digest}})
    _adapter(project, ".half", "not json")
    found = uses_of_row(project.dataset, project.adapters, new.key)
    uses = {s.adapter: s.use for s in found}
    assert uses == {
        "a-one": "absent",
        "b-two": "trained",
        "c-cut": "left out",
        "d-gone": "unknown",
        "e-foreign": "unknown",
        "f-old": "unknown",
    }
    assert all(s.reason for s in found if s.use == "unknown")
    for split in ("dev", "test"):
        row = _of(second, split)[0]
        assert {s.use for s in uses_of_row(project.dataset, project.adapters, row.key) if s.adapter == "b-two"} == {
            split
        }


def test_uses_of_row_refuses_an_unreadable_lineage(project: ProjectFolder) -> None:
    assert uses_of_row(project.dataset, project.adapters, "abc") == ()
    for broken in ("{", "[]"):
        _adapter(project, "broken", broken)
        with pytest.raises(UserError, match="lineage"):
            uses_of_row(project.dataset, project.adapters, "abc")
        shutil.rmtree(project.adapters)


def test_diff_counts_a_row_as_regrouped_only_when_cluster_members_change(
    project: ProjectFolder,
) -> None:
    a = load_version(project.dataset)
    gone, *_, one, two = sorted(_of(a, "train", 4), key=lambda m: m.key)
    clusters = {gone.key: one.key, one.key: one.key, two.key: two.key}
    named = _next_version(project, lambda m: replace(m, cluster=clusters.get(m.key, m.cluster)))
    fewer = _next_version(project, lambda m: None if m.key == gone.key else m)
    assert diff(named, fewer).regrouped == 0
    joined = _next_version(project, lambda m: replace(m, cluster=one.key) if m.key == two.key else m)
    assert diff(fewer, joined).regrouped == 2
