"""A split that the authors made: read as people write it, kept in every version, and near rows on two sides found."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, jaccard, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.config import DataConfig, read_split
from tunewright.config.io import load_config, write_config
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.browse import leakage
from tunewright.data.given_split import splits_of_files
from tunewright.data.options import AddOptions
from tunewright.data.preview import check_files
from tunewright.data.splits import SPLITS
from tunewright.data.verify import verify
from tunewright.data.versions import Member, import_files, import_records, load_version

COLUMN = "data: {split_column: part, input: q, output: a}\n"
TRAIN, DEV, TEST = 60, 12, 20

Row = dict[str, Any]


def _rows(part: str | None, count: int, seed: int) -> list[Row]:
    named = {} if part is None else {"part": part}
    return [{"q": q, "a": a, **named} for q, a in unlike_pairs(count, seed)]


def _parts() -> list[Row]:
    return [*_rows("training", TRAIN, 1), *_rows(" Val ", DEV, 2), *_rows("TEST", TEST, 3)]


def _near(row: Row, part: str | None, answer: str = "another") -> Row:
    named = {} if part is None else {"part": part}
    return {"q": row["q"] + "!", "a": answer, **named}


def _project(root: Path, on_overlap: str = "drop-train", more: str = "") -> ProjectFolder:
    text = f"data: {{split_column: part, input: q, output: a, on_overlap: {on_overlap}{more}}}\n"
    return new_project(root, text)


def _add(
    project: ProjectFolder, rows: Sequence[Row] | Path, listener: Listener | None = None, **options: Any
) -> AddResult:
    path = rows if isinstance(rows, Path) else write_rows(project.root / "a.jsonl", rows)
    return add(project, [path], listener or Listener(), AddOptions(**options))


def _of(project: ProjectFolder) -> dict[str, Member]:
    return {m.example.input_text: m for m in load_version(project.dataset).members}


def _torn(project: ProjectFolder) -> set[str]:
    sides = defaultdict(set)
    for member in load_version(project.dataset).members:
        sides[member.cluster].add(member.split)
    return {name for name, splits in sides.items() if len(splits) > 1}


# Reading


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("train", w) for w in ("train", "TRAIN", " training ", "Training")),
        *(("dev", w) for w in ("dev", "val", "Valid", "validation", "DEVELOPMENT")),
        *(("test", w) for w in ("test", "Test\t", "testing")),
    ],
)
def test_read_split_takes_the_names_that_people_write(written: str, meant: str) -> None:
    assert read_split(meant) == written


@pytest.mark.parametrize("name", ["eval", "holdout", "", "trian", None, 1])
def test_read_split_refuses_other_names_with_the_list(name: object) -> None:
    with pytest.raises(ValueError, match=r"train, training, dev, .*validation, test, testing"):
        read_split(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_column_decides_the_split_in_every_format(tmp_path: Path, name: str) -> None:
    project, rows = _project(tmp_path), _parts()
    _add(project, write_rows(tmp_path / name, rows))
    found = _of(project)
    assert {row["q"]: read_split(row["part"]) for row in rows} == {text: m.split for text, m in found.items()}
    assert all(m.given == m.split for m in found.values())


def test_column_is_no_part_of_the_example(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {split_column: part, input: '{{ row | tojson }}', output: '{{ a }}'}\n")
    _add(project, _parts())
    records = list(import_records(import_files(project.dataset, load_version(project.dataset).manifest)))
    assert all("part" not in m.example.input_text for m in load_version(project.dataset).members)
    assert all("part" not in record.get("metadata", {}) for record in records)
    assert any('"q"' in m.example.input_text for m in load_version(project.dataset).members)


def test_split_column_may_not_be_used_twice() -> None:
    with pytest.raises(ValueError, match="split_column names part"):
        DataConfig(split_column="part", group_by=("part",))


def test_sources_with_a_split_are_written_and_read(tmp_path: Path) -> None:
    sources = ["train.csv", {"path": "test.csv", "split": "test"}]
    path = tmp_path / "tunewright.yaml"
    path.write_text(write_config({"data": {"sources": sources}}), encoding="utf-8")
    config = load_config(path)
    assert [(each.path, each.split) for each in config.data.sources] == [("train.csv", None), ("test.csv", "test")]
    assert config.data.model_dump(mode="json")["sources"] == sources


@pytest.mark.parametrize(
    ("source", "key", "says"),
    [("{path: b.csv, split: eval}", "data.sources.1.split", "eval"), ("3", "data.sources.1", "a path, or {path:")],
)
def test_unusable_source_is_refused_by_line(tmp_path: Path, source: str, key: str, says: str) -> None:
    path = tmp_path / "tunewright.yaml"
    path.write_text(f"data:\n  sources:\n  - a.csv\n  - {source}\n", encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert refusal.value.where == f"{path}:4"
    assert f"{key}: " in refusal.value.what and says in refusal.value.what


@pytest.mark.parametrize(
    ("cell", "says"),
    [("", "empty"), (None, "empty"), ("eval", '"eval"'), (3, "3")],
)
def test_unusable_cell_is_a_fault_with_its_line(tmp_path: Path, cell: Any, says: str) -> None:
    project, rows = _project(tmp_path), _parts()
    rows[3]["part"] = cell
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as refusal:
        _add(project, path)
    assert f"{path}:4: part is {says}" in refusal.value.what and "E210" in refusal.value.what
    assert not project.dataset.exists() or not list(project.dataset.glob("versions/*"))
    assert _add(project, path, skip_bad=True).version.counts.rows == len(rows) - 1


def test_row_without_the_column_is_a_fault(tmp_path: Path) -> None:
    project = _project(tmp_path)
    with pytest.raises(UserError, match='missing key "part"') as refusal:
        _add(project, [*_parts(), *_rows(None, 2, 9)])
    assert "2 faulty rows" in refusal.value.what


def test_file_with_another_split_than_its_column_is_refused(tmp_path: Path) -> None:
    project = _project(tmp_path)
    path = write_rows(tmp_path / "a.jsonl", _parts())
    with pytest.raises(UserError) as refusal:
        _add(project, path, split=("test",))
    assert "E211" in refusal.value.what and f"{TRAIN + DEV} faulty rows" in refusal.value.what


# Files


def _files(root: Path) -> dict[str, Path]:
    parts = {"train": _rows(None, TRAIN, 1), "dev": _rows(None, DEV, 2), "test": _rows(None, TEST, 3)}
    return {part: write_rows(root / f"{part}.jsonl", rows) for part, rows in parts.items()}


def _add_given(project: ProjectFolder, splits: Mapping[Path, str], **options: Any) -> AddResult:
    named = tuple(f"{path}={split}" for path, split in splits.items())
    return add(project, splits, Listener(), AddOptions(split=named, **options))


def _split_counts(project: ProjectFolder) -> dict[str, int]:
    version = load_version(project.dataset)
    return {split: len(version.examples(split)) for split in SPLITS}


@pytest.mark.parametrize("how", ["sources", "a pattern", "options"])
def test_files_are_given_to_splits(tmp_path: Path, how: str) -> None:
    train, dev = "{path: train.jsonl, split: train}", "{path: dev.jsonl, split: val}"
    sources = {
        "sources": f"[{train}, {dev}, {{path: ./test.jsonl, split: TEST}}]",
        "a pattern": f"[{{path: tr*.jsonl, split: train}}, {dev}, {{path: te*, split: test}}]",
        "options": "[]",
    }[how]
    project = new_project(tmp_path, f"data: {{input: q, output: a, sources: {sources}}}\n")
    files = _files(tmp_path)
    named = tuple(f"{path}={split}" for split, path in files.items()) if how == "options" else ()
    add(project, files.values(), Listener(), AddOptions(split=named))
    assert _split_counts(project) == {"train": TRAIN, "dev": DEV, "test": TEST}
    about = load_version(project.dataset).manifest.given_split
    assert about is not None and about.sources == ("dev.jsonl", "test.jsonl", "train.jsonl")


def test_source_with_a_split_covers_only_the_files_that_it_names(tmp_path: Path) -> None:
    sources = (
        "[{path: 'last/*.jsonl', split: test}, {path: 'hf://datasets/a/b:test', split: test}, {path: year, split: dev}]"
    )
    project = new_project(tmp_path, f"data: {{sources: {sources}}}\n")
    names = ["last/a.jsonl", "last/older/a.jsonl", "a.jsonl", "year/month/a.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, [])
    found = splits_of_files([tmp_path / name for name in names], project, (), Listener())
    assert list(found.values()) == ["test", None, None, "dev"]
    of_folder = splits_of_files([tmp_path / "last"], project, (f"{tmp_path / 'last' / 'older'}/=train",), Listener())
    assert sorted(map(str, of_folder.values())) == ["test", "train"]


def test_files_named_after_splits_are_reported_before_a_split_is_drawn(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = [write_rows(tmp_path / f"{name}.jsonl", _rows(None, 20, i)) for i, name in enumerate(["train", "test"])]
    with pytest.raises(UserError, match=r"test[.]json is not among the files: .*train[.]jsonl") as caught:
        add(project, files, Listener(), AddOptions(split=("test.json=test",)))
    assert caught.value.where == "--split"
    drawn, kept = Listener(), Listener()
    check_files(OpenFolder(project, kept), files, AddOptions(split=(f"{files[1]}=test",)))
    add(project, files, drawn)
    notice = "train.jsonl and test.jsonl seem to be a split by their authors"
    assert [notice in " ".join(each.said) for each in (drawn, kept)] == [True, False]
    # Equal notes on several files are one note.
    notes = [line for line in drawn.said if "JSON Lines" in line]
    assert len(notes) == 1 and notes[0].startswith(f"{files[0]} and 1 more: JSON Lines: ")
    again = Listener()
    add(project, files, again)  # the split is drawn, and stays
    assert notice not in " ".join(again.said)


def test_rows_without_a_split_are_drawn_but_not_for_a_split_that_authors_gave(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = _files(tmp_path)
    add(project, [files["train"], files["test"]], Listener(), AddOptions(split=(f"{files['test']}=test",)))
    assert _split_counts(project) == {"train": TRAIN - 8, "dev": 8, "test": TEST}  # a tenth of 80
    assert {m.split for m in _of(project).values() if m.given is None} == {"train", "dev"}
    # Later rows are drawn in the same way.
    _add(project, write_rows(tmp_path / "more.jsonl", _rows(None, 100, 5)))
    assert _split_counts(project)["test"] == TEST
    assert _split_counts(project)["dev"] == 18


def test_dev_is_drawn_from_the_authors_training_rows_if_they_gave_none(tmp_path: Path) -> None:
    project, listener = _project(tmp_path), Listener()
    _add(project, [row for row in _parts() if row["part"] != " Val "], listener)
    assert _split_counts(project) == {"train": TRAIN - 8, "dev": 8, "test": TEST}
    assert {m.given for m in _of(project).values() if m.split == "dev"} == {"train"}
    assert any("dev has 8 of their training rows" in said for said in listener.said)
    # A row near one of them follows it: both are the authors' training rows.
    drawn = next(text for text, m in _of(project).items() if m.split == "dev")
    result = _add(project, write_rows(tmp_path / "b.jsonl", [{"q": drawn + "!", "a": "new", "part": "train"}]))
    assert (result.added, result.overlapping) == (1, ())
    assert _of(project)[drawn + "!"].split == "dev"


@pytest.mark.parametrize(
    ("options", "where", "says"),
    [
        (("evaluation",), "--split", "evaluation"),
        (("none.jsonl=test",), "--split", "none.jsonl"),
        (("test", "train"), "--split", "test and train"),
        (("train", "train.jsonl=test"), "train.jsonl", "test and train"),
    ],
)
def test_split_option_that_cannot_apply_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], where: str, says: str
) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        add(project, ["train.jsonl", "test.jsonl"], Listener(), AddOptions(split=options))
    assert refusal.value.where == where and says in refusal.value.what


def test_file_given_to_test_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = _files(tmp_path)
    files["test"].write_text('{"q": "", "a": "no question"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="No row for test") as refusal:
        _add_given(project, {files["train"]: "train", files["test"]: "test"}, skip_bad=True)
    assert refusal.value.where == str(files["test"])


def test_file_without_a_usable_row_is_not_confused_with_a_longer_name(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = _files(tmp_path)
    faulty = tmp_path / "test.json"
    faulty.write_text('[{"q": "", "a": "no question"}]', encoding="utf-8")
    with pytest.raises(UserError, match="No row for test") as refusal:
        _add_given(project, {files["train"]: "train", faulty: "test", files["test"]: "test"}, skip_bad=True)
    assert refusal.value.where == str(faulty)


def test_split_without_rows_names_the_authors_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No row for test") as refusal:
        _add(_project(tmp_path), [row for row in _parts() if row["part"] != "TEST"])
    assert f"{DEV} dev, {TRAIN} train" in refusal.value.what


def test_generated_row_is_not_given_to_test(tmp_path: Path) -> None:
    project = new_project(tmp_path, "")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_rows(tmp_path / "g.jsonl", [{**row, "generated": {"teacher": "t"}}])
    with pytest.raises(UserError, match="a model wrote the answer"):
        _add(project, path, split=("test",))


# Versions


def test_split_is_sticky_and_part_of_the_digest(tmp_path: Path) -> None:
    project = _project(tmp_path / "given")
    first = _add(project, _parts()).version
    before = {text: (m.split, m.given) for text, m in _of(project).items()}
    assert _add(project, _parts()).created is False
    _add(project, write_rows(tmp_path / "b.jsonl", [*_rows("train", 30, 7), *_rows("test", 5, 8)]))
    after = _of(project)
    assert {text: (after[text].split, after[text].given) for text in before} == before
    assert sum(m.split == "test" for m in after.values()) == TEST + 5
    # The same rows in the same splits, without authors, are another version.
    drawn = new_project(tmp_path / "drawn", "data: {input: q, output: a}\n")
    _add(drawn, [{k: v for k, v in row.items() if k != "part"} for row in _parts()], split_from=project.root)
    assert {m.given for m in _of(drawn).values()} == {"train", "dev", "test"}  # --split-from inherits whose split it is
    assert load_version(drawn.dataset).digest == first.digest


def test_row_that_changes_its_split_in_a_later_file_is_refused(tmp_path: Path) -> None:
    project, rows = _project(tmp_path), _parts()
    _add(project, rows)
    moved = {**rows[-1], "part": "train"}
    path = write_rows(tmp_path / "b.jsonl", [*_rows("train", 2, 30), moved])
    with pytest.raises(UserError, match="1 row would change the split") as refusal:
        _add(project, path)
    assert refusal.value.where == f"{path}:3"
    assert "is given to train, but is in test (a.jsonl:92)" in refusal.value.what
    assert load_version(project.dataset).manifest.counts.rows == len(rows)


def test_drawn_rows_cannot_be_given_to_another_split_later(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = _files(tmp_path)
    _add(project, files["train"])
    with pytest.raises(UserError, match="would change the split"):
        _add(project, files["train"], split=("test",))


def test_pair_in_the_authors_training_and_test_files_is_a_test_row(tmp_path: Path) -> None:
    project, rows, listener = _project(tmp_path), _parts(), Listener()
    rows.insert(0, {**rows[-1], "part": "train"})
    for created in (True, False):  # the second time, the training file's copy is no change of the split
        result = _add(project, rows, listener)
        assert result.created is created
    assert _of(project)[rows[-1]["q"]].split == "test"
    assert any("a.jsonl:1 repeats" in warned for warned in listener.warned)


def test_training_file_with_a_copy_of_a_test_row_can_be_added_again(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files, copy = _files(tmp_path), _rows(None, 1, 3)
    train = write_rows(files["train"], [*_rows(None, TRAIN, 1), *copy])
    _add_given(project, {train: "train", files["test"]: "test"})
    write_rows(train, [*_rows(None, TRAIN, 1), *copy, *_rows(None, 1, 9)])
    result = _add_given(project, {train: "train"})
    assert (result.added, result.known) == (1, TRAIN + 1)
    assert _of(project)[copy[0]["q"]].split == "test"


def test_near_duplicate_of_a_test_row_is_dropped_again_when_its_file_is_added_again(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a, duplicates: drop}\n")
    files, test = _files(tmp_path), _rows(None, TEST, 3)
    train = write_rows(files["train"], [*_rows(None, TRAIN, 1), _near(test[0], None, test[0]["a"])])
    first = _add_given(project, {train: "train", files["test"]: "test"})
    again = _add_given(project, {train: "train"})
    assert (len(first.duplicates), len(again.duplicates), again.created) == (1, 1, False)
    assert _split_counts(project)["test"] == TEST


def test_old_dataset_opens_and_takes_given_rows(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    first = _add(project, _rows(None, 100, 1)).version
    assert first.given_split is None
    lines = (project.dataset / "versions" / first.digest[:12] / "members.tsv").read_text(encoding="utf-8")
    assert "given" not in lines
    result = _add(project, write_rows(tmp_path / "t.jsonl", _rows(None, 20, 2)), split=("test",))
    assert result.version.given_split is not None
    found = load_version(project.dataset).examples("test")
    assert (len(found), sum(m.given == "test" for m in found)) == (30, 20)
    assert verify(OpenFolder(project, Listener())).ok


# Near rows on two sides


def _with_overlap() -> list[Row]:
    rows = _parts()
    return [*rows, _near(rows[-1], "train"), _near(rows[TRAIN], "train"), _near(rows[-2], "dev")]


@pytest.mark.parametrize("mode", ["drop-train", "move", "keep"])
def test_rows_near_a_held_out_row_follow_on_overlap(tmp_path: Path, mode: str) -> None:
    project, rows, listener = _project(tmp_path, mode), _with_overlap(), Listener()
    checked = check_files(OpenFolder(project, Listener()), [write_rows(tmp_path / "a.jsonl", rows)])
    assert checked.effect is not None and checked.effect.overlapping == 3
    result = _add(project, rows, listener)
    assert sorted((each.place.rpartition(":")[2], each.split, each.held_out) for each in result.overlapping) == [
        ("93", "train", "test"),
        ("94", "train", "dev"),
        ("95", "dev", "test"),
    ]
    [said] = [warned for warned in listener.warned if f"data.on_overlap: {mode}" in warned]
    assert f"a.jsonl:93 (train) is near {project.root / 'a.jsonl'}:92 (test)" in said
    found = {row["q"]: m.split for row in rows[-3:] if (m := _of(project).get(row["q"]))}
    expected = {"drop-train": [], "move": ["test", "dev", "test"], "keep": ["train", "train", "dev"]}[mode]
    assert list(found.values()) == expected
    assert {row["q"]: read_split(row["part"]) for row in _parts()}.items() <= {
        text: m.split for text, m in _of(project).items()
    }.items()
    assert len(_torn(project)) == (3 if mode == "keep" else 0)
    checked_version = verify(OpenFolder(project, Listener()))
    assert checked_version.ok
    assert list(checked_version.straddling.values()) == ([3] if mode == "keep" else [])
    report = leakage(OpenFolder(project, Listener()))
    assert report.near_training == (2 if mode == "keep" else 0)
    assert report.authors_split == "column part of a.jsonl"
    records = import_records(import_files(project.dataset, result.version), "overlapping")
    assert [record["line"] for record in records] == ([93, 94, 95] if mode == "drop-train" else [])
    assert _add(project, rows).created is False  # the same files change nothing


def test_new_row_near_the_authors_test_is_left_out_of_training(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    files = _files(tmp_path)
    add(project, [files["train"], files["test"]], Listener(), AddOptions(split=(f"{files['test']}=test",)))
    new = [_near(_rows(None, TEST, 3)[0], None), *_rows(None, 5, 40)]
    result = _add(project, write_rows(tmp_path / "b.jsonl", new))
    assert [(each.split, each.held_out) for each in result.overlapping] == [(None, "test")]
    assert _split_counts(project)["test"] == TEST
    assert result.version.counts.rows == TRAIN + TEST + 5


def test_known_training_rows_near_a_later_test_file_leave(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    rows = _rows(None, 100, 1)
    _add(project, rows)
    trained = next(row for row in rows if _of(project)[row["q"]].split == "train")
    test = [_near(trained, None), *_rows(None, 20, 2)]
    result = _add(project, write_rows(tmp_path / "t.jsonl", test), split=("test",))
    assert [each.key for each in result.overlapping] == [
        key for key in (each.key for each in result.overlapping) if key not in {m.key for m in _of(project).values()}
    ]
    assert trained["q"] not in _of(project) and _of(project)[trained["q"] + "!"].split == "test"


def test_group_of_a_test_row_leaves_training(tmp_path: Path) -> None:
    project = _project(tmp_path, more=", group_by: [customer]")
    rows = [{**row, "customer": f"c{number}"} for number, row in enumerate(_parts())]
    rows[0]["customer"] = rows[-1]["customer"]
    result = _add(project, rows)
    assert [each.place.rpartition(":")[2] for each in result.overlapping] == ["1"]
    assert _torn(project) == set()


def test_rows_of_a_group_stay_if_only_another_row_is_near_the_test(tmp_path: Path) -> None:
    project, rows = _project(tmp_path, more=", group_by: [customer]"), _parts()
    near = {**_near(rows[-1], "train"), "customer": "x"}
    rows = [{**row, "customer": None} for row in rows]
    result = _add(project, [{**rows[0], "customer": "x"}, *rows[1:], near])
    assert [each.place.rpartition(":")[2] for each in result.overlapping] == [str(len(rows) + 1)]
    assert rows[0]["q"] in _of(project) and near["q"] not in _of(project)


def test_training_row_near_a_drawn_test_row_is_left_out_and_not_counted(tmp_path: Path) -> None:
    project = new_project(tmp_path, "data: {input: q, output: a}\n")
    _add(project, _rows(None, 100, 1))
    drawn = next(m for m in _of(project).values() if m.split == "test")
    path = write_rows(tmp_path / "b.jsonl", [_near({"q": drawn.example.input_text}, None)])
    result = _add(project, path, split=("train",))
    assert (result.added, result.created, len(result.overlapping)) == (0, False, 1)
    checked = check_files(OpenFolder(project, Listener()), [path], AddOptions(split=("train",)))
    assert checked.effect is not None and (checked.effect.added, checked.effect.overlapping) == (0, 1)


def test_damaged_split_without_keep_is_found(tmp_path: Path) -> None:
    project = _project(tmp_path, "keep")
    version = _add(project, _with_overlap()).version
    manifest = project.dataset / "versions" / version.digest[:12] / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"on_overlap": "keep"', '"on_overlap": "move"'), encoding="utf-8")
    assert manifest.read_text(encoding="utf-8") != text
    found = verify(OpenFolder(project, Listener()))
    assert any("3 clusters with rows in several splits" in each.what for each in found.damage)


SIDES = st.sampled_from(["train", "dev", "test"])


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.integers(0, 14), SIDES), max_size=25),
    st.sampled_from(["drop-train", "move", "keep"]),
    st.integers(0, 3),
)
def test_given_rows_stay_and_no_cluster_straddles_without_keep(
    tmp_path_factory: pytest.TempPathFactory, near: list[tuple[int, str]], mode: str, seed: int
) -> None:
    """Against a loop over all pairs: the authors' rows are on their side or gone, and near rows are on one side."""
    project = _project(tmp_path_factory.mktemp("given"), mode)
    draw, parts = random.Random(seed), _parts()
    chosen = draw.sample(parts, 15)
    extra = [
        {"q": f"{chosen[place]['q']} {number:x}", "a": f"extra {number}", "part": part}
        for number, (place, part) in enumerate(near)
    ]
    half = len(extra) // 2
    said: dict[str, str] = {}
    for rows in ([*parts, *extra[:half]], extra[half:]):
        if rows:
            _add(project, rows)
            said |= {row["q"]: read_split(row["part"]) for row in rows}
        _check_sides(_of(project), said, mode)


def _check_sides(found: Mapping[str, Member], said: Mapping[str, str], mode: str) -> None:
    rank: dict[str, int] = {split: number for number, split in enumerate(SPLITS)}
    for text, member in found.items():
        assert member.given == said[text]
        assert member.split == said[text] or (mode == "move" and rank[member.split] > rank[said[text]])
    assert mode == "drop-train" or found.keys() == said.keys()
    assert all(text in found for text, split in said.items() if split == "test")  # no test row is ever lost
    if mode == "keep":
        assert all(found[text].split == split for text, split in said.items())
        return
    texts = list(found)
    for number, one in enumerate(texts):
        for other in texts[:number]:
            if jaccard(one, other) >= 0.8:
                assert found[one].split == found[other].split
                assert found[one].cluster == found[other].cluster


def test_jsonl_pairs_without_options_are_drawn_as_before(tmp_path: Path) -> None:
    project = new_project(tmp_path, "")
    result = _add(project, write_jsonl(tmp_path / "a.jsonl", unlike_pairs(100)))
    assert result.version.given_split is None and result.overlapping == ()
    assert {m.given for m in load_version(project.dataset).members} == {None}
