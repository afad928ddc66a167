"""Rows that share a group stay in one split, and a fresh dataset keeps the split of another one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.options import AddOptions
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.data.versions.files import Place, member_line, places_of

GROUPED = "data: {group_by: [customer, ticket], conflicts: accept}\n"

Row = dict[str, str | int | None]


def _rows(count: int, seed: int, customers: int) -> list[Row]:
    draw = random.Random(seed)
    return [
        {
            "prompt": p,
            "completion": c,
            "customer": f"c{draw.randrange(customers)}",
            "ticket": draw.choice([None, 7, 8, 9]),
        }
        for p, c in unlike_pairs(count, seed)
    ]


def _add(project: ProjectFolder, rows: list[Row], listener: Listener | None = None) -> AddResult:
    path = write_rows(project.root / "rows.jsonl", rows)
    return add(project, [path], listener or Listener())


def _splits_of_values(version: DatasetVersion) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = defaultdict(set)
    for member in version.members:
        for value in member.groups:
            splits[value].add(member.split)
    return splits


def _unticketed(rows: list[Row]) -> list[Row]:
    return [{**row, "ticket": None} for row in rows]


@examples(15)
@given(seed=st.integers(0, 10_000))
def test_groups_stay_in_one_split_and_test_groups_in_test(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    project = new_project(tmp_path_factory.mktemp("groups") / "p", GROUPED)
    rows = _unticketed(_rows(90, seed, customers=60))
    held_out: set[str] = set()
    for end in (30, 60, 90):
        _add(project, rows[:end])
        version = load_version(project.dataset)
        assert all(len(splits) == 1 for splits in _splits_of_values(version).values())
        test = {m.key for m in version.examples("test")}
        assert held_out <= test
        held_out = test


def test_groups_of_different_keys_are_distinct(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", GROUPED)
    rows = [{**row, "customer": str(i), "ticket": i + 1} for i, row in enumerate(_rows(40, 1, 5))]
    result = _add(project, rows)
    assert result.version.counts.clusters == 40


def test_new_row_follows_its_group_into_test(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", GROUPED)
    rows = _unticketed([{**row, "customer": f"c{i}"} for i, row in enumerate(_rows(40, 2, 1))])
    _add(project, rows)
    tested = load_version(project.dataset).examples("test")[0]
    [customer] = tested.groups
    new = {"prompt": "something quite different", "completion": "yes", "customer": customer.removeprefix("customer=")}
    _add(project, [{**new, "ticket": None}])
    follower = next(m for m in load_version(project.dataset).members if m.example.output == "yes")
    assert (follower.split, follower.groups) == ("test", tested.groups)


def test_group_of_a_dropped_duplicate_binds_the_kept_row(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", GROUPED)
    rows = _unticketed([{**row, "customer": f"c{i}"} for i, row in enumerate(_rows(30, 3, 1))])
    _add(project, [*rows, {**rows[0], "customer": "other"}])
    kept = next(m for m in load_version(project.dataset).members if m.example.output == rows[0]["completion"])
    assert kept.groups == ("customer=c0", "customer=other")


def test_groups_named_later_are_read_when_the_file_is_added_again(tmp_path: Path) -> None:
    """Also where no cluster changes by them: the next row of the group has to find it."""
    project = new_project(tmp_path / "p", "data: {drop_columns: [customer, ticket]}\n")
    rows = _unticketed([{**row, "customer": f"c{i}"} for i, row in enumerate(_rows(40, 4, 1))])
    first = _add(project, rows)
    (project.root / "tunewright.yaml").write_text(GROUPED)
    project = ProjectFolder(project.root)
    listener = Listener()
    again = _add(project, rows[:-1], listener)
    assert again.created
    assert (again.added, again.known) == (0, 39)
    assert again.version.splits == first.version.splits
    assert any("1 row of the previous version without the group customer" in warning for warning in listener.warned)
    assert again.version.settings.group_by == ("customer", "ticket")


def test_row_without_a_group_key_is_a_fault(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", GROUPED)
    with pytest.raises(UserError, match=r'missing key "ticket" of data\.group_by'):
        _add(project, [*_rows(30, 5, 9), {"prompt": "a", "completion": "b", "customer": "c"}])


@given(st.lists(st.text(), max_size=3), st.booleans())
def test_member_with_groups_round_trips(groups: list[str], mixed: bool) -> None:
    place = Place("train", "b" * 64, tuple(sorted(set(groups))), mixed)
    line = member_line("a" * 64, place)
    assert line.count("\n") == 1
    assert places_of(line, "members.tsv") == {"a" * 64: place}


@pytest.mark.parametrize(
    "more",
    ['{"group":["a"]}', '{"groups":[1]}', '{"groups":["b","a"]}', '{"groups":["a","a"]}', '{"mix":1}', "[]", "{"],
)
def test_member_with_other_facts_is_refused(more: str) -> None:
    """A pulled version's digest is right whatever its members are."""
    with pytest.raises(UserError) as caught:
        places_of(f"{'a' * 64}\ttrain\t{'b' * 64}\t{more}\n", "versions/1/members.tsv")
    assert str(caught.value.where).startswith("versions/1/members.tsv: aaa")


def test_secret_group_value_is_refused_and_redaction_keeps_the_group(tmp_path: Path) -> None:
    """Values are stored unchanged with the version, in a file that is committed and pushed."""
    project = new_project(tmp_path / "p", GROUPED)
    card = "4539 1488 0343 6467"
    rows = _unticketed([{**row, "customer": f"c{i}"} for i, row in enumerate(_rows(40, 7, 1))])
    rows[3]["customer"] = rows[9]["customer"] = card
    rows[5]["customer"] = "maria.lopez@uni-bonn.de"
    with pytest.raises(UserError, match="2 secrets in groups or metadata, nothing was added") as caught:
        _add(project, rows)
    assert "rows.jsonl:4: payment card number in the group customer" in caught.value.what
    assert card not in str(caught.value)
    assert not (project.dataset / "HEAD").exists()
    add(project, [project.root / "rows.jsonl"], Listener(), AddOptions(redact=True))
    for path in project.dataset.rglob("*.*"):
        if path.is_file():
            assert card not in path.read_text(encoding="utf-8")
            assert "maria.lopez" not in path.read_text(encoding="utf-8")
    version = load_version(project.dataset)
    sharing = {m.cluster for m in version.members if m.example.output in (rows[3]["completion"], rows[9]["completion"])}
    assert len(sharing) == 1


@pytest.mark.parametrize(
    ("customer", "words"),
    [
        (lambda i: "ACME", "all 60 rows with customer have the same value"),
        (lambda i: f"c{i}", "customer has 60 different values in 60 rows"),
        (lambda i: f"c{i // 2}", None),
    ],
)
def test_add_warns_of_a_group_that_separates_nothing(
    tmp_path: Path, customer: Callable[[int], str], words: str | None
) -> None:
    project = new_project(tmp_path / "p", "data: {group_by: [customer]}\n")
    rows = [
        {"prompt": text, "completion": answer, "customer": customer(i)}
        for i, (text, answer) in enumerate(unlike_pairs(60))
    ]
    listener = Listener()
    path = write_rows(tmp_path / "rows.jsonl", rows)
    if words is not None and words.startswith("all"):
        with pytest.raises(UserError, match="Too few independent rows to split") as refusal:
            add(project, [path], listener)
        assert "data.group_by (customer) joins rows that share a value" in str(refusal.value.fix)
    else:
        add(project, [path], listener)
    reported = [w for w in listener.warned if w.startswith("data.group_by:")]
    assert [words in w for w in reported] == [True] if words is not None else not reported


@pytest.fixture
def old(tmp_path: Path) -> ProjectFolder:
    """A project with 60 rows and a system turn."""
    project = new_project(tmp_path / "old", "data: {system_prompt: Be kind.}\n")
    add(project, [write_jsonl(tmp_path / "old.jsonl", unlike_pairs(60))], Listener())
    return project


def _splits(project: ProjectFolder) -> dict[str, str]:
    return {m.example.input_text: m.split for m in load_version(project.dataset).members}


@pytest.mark.parametrize("named", [".", "dataset"])
def test_inherit_split_keeps_splits_of_shared_inputs(tmp_path: Path, old: ProjectFolder, named: str) -> None:
    new = new_project(tmp_path / "new", "seed: 7\ndata: {system_prompt: Be terse.}\n")
    rows = [(f" {text.upper()}", f"new {answer}") for text, answer in unlike_pairs(60)[5:]]
    listener = Listener()
    path = write_jsonl(tmp_path / "new.jsonl", [*rows, *unlike_pairs(20, seed=3)])
    result = add(new, [path], listener, AddOptions(split_from=old.root / named))
    before = _splits(old)
    now = {text.strip().casefold(): split for text, split in _splits(new).items()}
    shared = {text: split for text, split in before.items() if text in now}
    assert len(shared) == 55
    assert {text: now[text] for text in shared} == shared
    about = result.version.split_from
    assert about is not None
    assert (about.name, about.digest, about.rows) == ("old", load_version(old.dataset).digest, 55)
    assert any("55 of 75 rows inherited" in said for said in listener.said)
    # What comes later keeps it too.
    add(new, [write_jsonl(tmp_path / "more.jsonl", unlike_pairs(20, seed=4))], Listener())
    later = {text.strip().casefold(): split for text, split in _splits(new).items()}
    assert {text: later[text] for text in shared} == shared


def test_inherit_split_moves_a_cluster_with_its_held_out_row(tmp_path: Path, old: ProjectFolder) -> None:
    before = _splits(old)
    test = next(text for text, split in before.items() if split == "test")
    new = new_project(tmp_path / "new")
    rows = [*unlike_pairs(60), (test + "?", "a near one")]
    add(new, [write_jsonl(tmp_path / "new.jsonl", rows)], Listener(), AddOptions(split_from=old.root))
    now = _splits(new)
    assert now[test + "?"] == "test"
    assert {text: now[text] for text in before} == before


def test_inherit_split_counts_rows_that_move(tmp_path: Path) -> None:
    text = "what is the monthly fee for a late payment by credit card in {} if I pay it by hand"
    old = new_project(tmp_path / "old", "data: {dedup_threshold: 0.99}\n")
    family = [(text.format(f"{n:02}"), f"answer {n}") for n in range(10, 40)]
    add(old, [write_jsonl(tmp_path / "a.jsonl", [*family, *unlike_pairs(20)])], Listener())
    assert {split for t, split in _splits(old).items() if t.startswith("what")} >= {"train", "test"}
    new = new_project(tmp_path / "new")
    listener = Listener()
    add(new, [tmp_path / "a.jsonl"], listener, AddOptions(split_from=old.root))
    [reported] = [said for said in listener.said if said.startswith("Split from old")]
    assert "moved, because" in reported
    assert {split for t, split in _splits(new).items() if t.startswith("what")} == {"test"}


@pytest.mark.parametrize("case", ["nothing there", "nothing shared", "not fresh"])
def test_inherit_split_refuses_impossible_cases(tmp_path: Path, old: ProjectFolder, case: str) -> None:
    new = new_project(tmp_path / "new")
    other = write_jsonl(tmp_path / "other.jsonl", unlike_pairs(30, seed=8))
    words = {
        "nothing there": "No dataset there",
        "nothing shared": "share no pair or input with version",
        "not fresh": "already has a split",
    }
    if case == "not fresh":
        add(new, [other], Listener())
    path = tmp_path if case == "nothing there" else old.root
    with pytest.raises(UserError, match=words[case]):
        add(new, [other], Listener(), AddOptions(split_from=path))
