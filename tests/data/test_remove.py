"""Removing rows: which go, what keeps them out, who saw them, and what a purge leaves of their text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import WORDS, Listener, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.remove import RemoveResult, find_copies, remove
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import NoteEvent, VerdictEvent, append_reviews, read_reviews
from tunewright.data.trace import find_row, metadata_by_key
from tunewright.data.verify import verify
from tunewright.data.versions import checkout, list_versions, load_version, version_folder
from tunewright.data.versions.diff import diff

WHEN = "2026-11-25T10:00:00.000+00:00"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with 40 rows of two customers in a.jsonl and 10 more in b.jsonl."""
    project = new_project(tmp_path_factory.mktemp("remove") / "p", "data: {group_by: [customer], conflicts: accept}\n")
    rows = unlike_pairs(50)
    for name, part in (("a.jsonl", rows[:40]), ("b.jsonl", rows[40:])):
        lines = [
            {"prompt": p, "completion": c, "customer": f"C{i}" if i < 30 else None} for i, (p, c) in enumerate(part)
        ]
        write_rows(project.root / name, lines)
    _add(project, "a.jsonl")
    _add(project, "b.jsonl")
    return project


@pytest.fixture
def project(pristine: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    """A copy to be changed."""
    shutil.copytree(pristine.root, tmp_path / "p")
    return ProjectFolder(tmp_path / "p")


def _add(project: ProjectFolder, *names: str, listener: Listener | None = None, **options: Any) -> AddResult:
    return add(project, [project.root / name for name in names], listener or Listener(), AddOptions(**options))


def _remove(
    project: ProjectFolder, listener: Listener | None = None, because: str = "mislabelled", **which: Any
) -> RemoveResult:
    return remove(OpenFolder(project, listener or Listener()), RemoveOptions(because=because, **which))


def _keys(project: ProjectFolder) -> set[str]:
    return {m.key for m in load_version(project.dataset).members}


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _train_rows(project: ProjectFolder, count: int) -> list[str]:
    return [m.key for m in load_version(project.dataset).examples("train")][:count]


def test_remove_takes_out_the_rows_that_a_file_names_by_key_prefix_or_object(project: ProjectFolder) -> None:
    one, two, three = _train_rows(project, 3)
    names = project.root / "keys.txt"
    names.write_text(f"{one}\n\n{two[:16].upper()}\n" + json.dumps({"key": three, "note": "x"}) + "\n")
    before = _keys(project)
    result = _remove(project, keys=names)
    assert _keys(project) == before - {one, two, three}
    assert (result.created, result.splits) == (True, {"train": 3, "dev": 0, "test": 0})
    assert result.version.message == "3 rows removed: mislabelled"
    assert verify(OpenFolder(project, Listener())).ok


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("0123456789abcdef\n", "no row has the key"),
        ("not hex\n", "Not a row's key"),
        ('{"id": 3}\n', "Not a row's key"),
        ('{"suspects": [{"key": "0123456789"}, {"id": 1}]}', "item 2: Not a row's key"),
        ('["0123456789", "abcdef012345"]', "item 1: no row has the key 0123456789"),
        ('{"suspects": []}', "The file has no key"),
        ("row,from\n0123456789,x\n", "2: no row has the key 0123456789"),
        ("row;from\n0123456789\n", "1 fields where the header has 2"),
        ("{broken\n", "Not a JSON object"),
        ("\n", "The file has no key"),
    ],
)
def test_remove_refuses_a_file_of_keys_that_names_no_row(project: ProjectFolder, lines: str, words: str) -> None:
    names = project.root / "keys.txt"
    names.write_text(lines)
    before = _snapshot(project.dataset)
    with pytest.raises(UserError, match=words):
        _remove(project, keys=names)
    assert _snapshot(project.dataset) == before


def test_remove_takes_rows_by_query(project: ProjectFolder) -> None:
    result = _remove(project, where="split == 'train' && starts_with(output, 'answer 1') && source == 'a.jsonl'")
    expected = {f"answer {i}" for i in (1, *range(10, 20))}
    assert {row.document["output"] for row in result.rows} <= expected
    assert all(m.split != "train" or m.example.output not in expected for m in load_version(project.dataset).members)
    assert result.rows


@pytest.mark.parametrize(
    ("where", "words"),
    [("output ==", "Invalid JMESPath"), ("contains(line, 'a')", "The expression fails on row"), ("a", "No row of")],
)
def test_remove_refuses_a_query_that_fails_or_matches_nothing(project: ProjectFolder, where: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _remove(project, where=where)


def test_remove_takes_rows_by_the_file_that_brought_them(project: ProjectFolder) -> None:
    (project.root / "c.jsonl").write_bytes((project.root / "b.jsonl").read_bytes())
    _add(project, "c.jsonl")
    with pytest.raises(UserError, match=r"No row was read from a file c\.jsonl"):
        _remove(project, source="c.jsonl")
    removed = _remove(project, source=str(project.root / "b.jsonl"))
    assert {row.source for row in removed.rows} == {"b.jsonl"}
    assert len(removed.rows) == 10


def test_remove_counts_rows_that_another_file_had_first(project: ProjectFolder) -> None:
    both = (project.root / "b.jsonl").read_text().splitlines()[:3]
    more = [json.dumps({"prompt": p, "completion": c, "customer": None}) for p, c in unlike_pairs(4, seed=7)]
    (project.root / "c.jsonl").write_text("\n".join([*both, *more]) + "\n")
    _add(project, "c.jsonl")
    listener = Listener()
    assert len(_remove(project, listener, source="c.jsonl").rows) == 4
    assert any(
        warned.startswith("3 rows of c.jsonl stay, because another file had them first") for warned in listener.warned
    )


def test_remove_takes_rows_of_any_named_group_that_match_the_other_options(project: ProjectFolder) -> None:
    result = _remove(project, groups=("customer=C3", "customer=C4"), source="a.jsonl")
    assert sorted(group for row in result.rows for group in row.document["groups"]) == ["customer=C3", "customer=C4"]
    with pytest.raises(UserError, match="No row has the group 'customer=Nobody'"):
        _remove(project, groups=("customer=Nobody",))


def test_remove_needs_a_reason_and_a_selection(project: ProjectFolder) -> None:
    with pytest.raises(UserError, match="needs a reason"):
        _remove(project, because=" ", source="b.jsonl")
    assert _remove(project, because="", source="b.jsonl", dry_run=True).rows
    with pytest.raises(UserError, match="No rows are selected"):
        _remove(project)


def test_dry_run_lists_rows_and_changes_nothing(project: ProjectFolder) -> None:
    before = _snapshot(project.dataset)
    result = _remove(project, source="b.jsonl", dry_run=True, purge=True)
    assert (result.dry_run, result.created, len(result.rows), result.purged) == (True, False, 10, 0)
    assert all(row.document["input"] for row in result.rows)
    assert _snapshot(project.dataset) == before


@pytest.mark.parametrize(
    ("where", "words"),
    [("split == 'test'", "No test row would be left"), ("line > `1`", "clusters would be left|No .* row")],
)
def test_remove_refuses_to_leave_too_little(project: ProjectFolder, where: str, words: str) -> None:
    before = _snapshot(project.dataset)
    with pytest.raises(UserError, match=words):
        _remove(project, where=where)
    assert _snapshot(project.dataset) == before


def test_removed_row_stays_out_when_its_file_is_added_again(project: ProjectFolder) -> None:
    [key] = _train_rows(project, 1)
    place = find_row(project.dataset, load_version(project.dataset), key)
    names = project.root / "keys.txt"
    names.write_text(key)
    _remove(project, keys=names)
    listener = Listener()
    again = _add(project, "a.jsonl", "b.jsonl", listener=listener)
    assert (again.added, again.created, len(again.removed)) == (0, False, 1)
    assert key not in _keys(project)
    [reported] = [w for w in listener.warned if "removed earlier" in w]
    assert "--restore" in reported
    assert "mislabelled" in reported
    with pytest.raises(UserError, match="The row was removed: mislabelled"):
        find_row(project.dataset, load_version(project.dataset), again.removed[0].rpartition("/")[2])
    # Also where nothing but case, white space and the system turn differ.
    same = {"prompt": f" {place.example.input_text.upper()} ", "completion": place.example.output, "customer": None}
    (project.root / "same.jsonl").write_text(json.dumps(same))
    assert _add(project, "same.jsonl").added == 0
    # With a corrected label, it is another row.
    (project.root / "mended.jsonl").write_text(json.dumps({**same, "completion": "the right answer"}))
    assert _add(project, "mended.jsonl").added == 1


def test_restore_adds_removed_rows_permanently(project: ProjectFolder) -> None:
    removed = _remove(project, source="b.jsonl")
    assert len(_keys(project)) == 40
    back = _add(project, "b.jsonl", restore=True)
    assert (back.added, back.removed) == (10, ())
    assert _add(project, "b.jsonl").removed == ()
    names = project.root / "keys.txt"
    names.write_text(removed.rows[0].key)
    _remove(project, keys=names)
    assert _add(project, "b.jsonl").removed != ()


def test_superseded_row_does_not_return_for_a_removed_edit(project: ProjectFolder) -> None:
    [key] = _train_rows(project, 1)
    edit = VerdictEvent(key=key, verdict="edit", output="better", version="0" * 64, reviewer="ada", when=WHEN)
    append_reviews(project.dataset, [edit])
    apply_edits(project, Listener())
    _remove(project, where="output == 'better'")
    assert _add(project, "a.jsonl", "b.jsonl").added == 0


def test_remove_counts_adapters_and_evaluations_with_the_rows(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    for name, left_out in (("one-0123456789ab", []), ("two-0123456789ab", ["x"])):
        folder = project.adapters / name
        folder.mkdir(parents=True)
        digest = version.digest if not left_out else "f" * 64
        lineage = {"dataset": {"digest": digest}, "rendering": {"train": {"left_out": []}}}
        (folder / "lineage.json").write_text(json.dumps(lineage))
    tested = [m.key for m in version.examples("test")][:1]
    measured = project.evaluations / "0123456789ab"
    measured.mkdir(parents=True)
    (measured / "items.jsonl").write_text("".join(json.dumps({"key": key}) + "\n" for key in tested))
    names = project.root / "keys.txt"
    names.write_text("\n".join([*_train_rows(project, 2), *tested]))
    result = _remove(project, keys=names)
    one, two = result.adapters
    assert (one.adapter, one.trained, one.dev, one.test, one.unknown) == ("one-0123456789ab", 2, 0, 1, 0)
    assert (two.adapter, two.unknown) == ("two-0123456789ab", 3)
    assert result.evaluations == {"0123456789ab": 1}


@examples(15)
@given(seed=st.integers(0, 1000), which=st.sets(st.integers(0, 59), min_size=1, max_size=20))
def test_remove_keeps_the_places_of_other_rows(
    tmp_path_factory: pytest.TempPathFactory, seed: int, which: set[int]
) -> None:
    project = new_project(tmp_path_factory.mktemp("left") / "p", "data: {conflicts: accept}\n")
    rows = unlike_pairs(50, seed)
    rows += [(text + "?", answer if n % 2 else "another") for n, (text, answer) in enumerate(rows[:10])]
    write_jsonl(project.root / "all.jsonl", rows)
    _add(project, "all.jsonl")
    before = load_version(project.dataset)
    gone = {before.members[n].key for n in which}
    kept = {m.key: m.split for m in before.members if m.key not in gone}
    names = project.root / "keys.txt"
    names.write_text("".join(f"{key}\n" for key in sorted(gone)))
    if set(kept.values()) != {"train", "dev", "test"}:
        with pytest.raises(UserError, match="row would be left"):
            _remove(project, keys=names)
        return
    _remove(project, keys=names)
    after = load_version(project.dataset)
    assert {m.key: m.split for m in after.members} == kept
    clusters: dict[str, set[str]] = {}
    for member in after.members:
        clusters.setdefault(member.cluster, set()).add(member.key)
    assert all(name == min(keys) for name, keys in clusters.items())
    assert verify(OpenFolder(project, Listener())).damage == ()
    again = _add(project, "all.jsonl")
    assert (again.added, len(again.removed)) == (0, len(gone))
    assert _keys(project) == kept.keys()


def test_removed_row_of_the_mix_is_not_drawn_again(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {mix: {source: generic.jsonl, fraction: 0.1}}\n")
    write_jsonl(project.root / "generic.jsonl", unlike_pairs(20, seed=5))
    write_jsonl(project.root / "all.jsonl", unlike_pairs(60))
    _add(project, "all.jsonl")
    gone = {row.key for row in _remove(project, where="mixed").rows}
    assert gone
    assert load_version(project.dataset).manifest.counts.mixed == 0
    _add(project, "all.jsonl")
    mixed = {m.key for m in load_version(project.dataset).members if m.mixed}
    assert mixed
    assert not mixed & gone


# Purge


def _secret_project(root: Path, secrets: list[str], seed: int = 0) -> ProjectFolder:
    project = new_project(root, "data: {conflicts: accept}\n")
    rows = [
        *unlike_pairs(40, seed),
        *((f"my name is {secret} and I lost it", f"sorry, {secret}!") for secret in secrets),
    ]
    write_jsonl(project.root / "all.jsonl", rows)
    _add(project, "all.jsonl")
    return project


def _holding(root: Path, secret: str) -> list[str]:
    return [name for name, data in _snapshot(root).items() if secret.encode() in data]


@examples(10)
@given(seed=st.integers(0, 1000), count=st.integers(1, 4), step=st.sampled_from(["edit", "replace", "removed before"]))
def test_purge_leaves_no_text_and_keeps_digests_valid(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, step: str
) -> None:
    """The row's former texts included: of an edit, of a replacement, or of a version that no longer has it."""
    secrets = [f"Zoë-{seed}-{n}-{WORDS[n]}" for n in range(count)]
    project = _secret_project(tmp_path_factory.mktemp("purge") / "p", secrets, seed)
    rows = {m.example.input_text: m for m in load_version(project.dataset).members}
    gone = [m for text, m in rows.items() if "Zoë" in text]
    other = next(m.key for m in rows.values() if m not in gone)
    kept = VerdictEvent(key=other, verdict="edit", output="kept", version="0" * 64, reviewer="ben", when=WHEN)
    if step == "edit":
        said = [
            VerdictEvent(
                key=m.key, verdict="edit", output=f"an edit for {m.key}", version="0" * 64, reviewer="ada", when=WHEN
            )
            for m in gone
        ]
        notes = [
            NoteEvent(key=m.key, text=f"a note on {m.key}", version="0" * 64, reviewer="ada", when=WHEN) for m in gone
        ]
        append_reviews(project.dataset, [*said, *notes])
        apply_edits(project, Listener())
    elif step == "replace":
        write_jsonl(project.root / "new.jsonl", [(m.example.input_text, f"new for {m.key}") for m in gone])
        _add(project, "new.jsonl", replace=True)
        (project.root / "new.jsonl").unlink()
    elif all(m.split == "train" for m in gone):
        _remove(project, where="contains(input, 'Zoë')")
    (project.root / "all.jsonl").unlink()
    before = [m.digest for m in list_versions(project.dataset)]
    append_reviews(project.dataset, [kept])
    result = _remove(project, where="contains(input, 'Zoë')", because="she asked", purge=True)
    assert result.purged >= count
    assert read_reviews(project.dataset).current_verdicts(other)["ben"].output == "kept"
    assert result.holders == ()
    for word in (
        "Zoë",
        "Zo\\u00eb",
        *(f"an edit for {m.key}" for m in gone),
        *(f"{text} {m.key}" for m in gone for text in ("new for", "a note on")),
    ):
        assert _holding(project.root, word) == []
    found = verify(OpenFolder(project, Listener()))
    assert found.damage == ()
    assert {purge.key for purge in found.purges} >= {m.key for m in gone}
    assert [m.digest for m in list_versions(project.dataset)][: len(before)] == before


def test_purged_row_stays_out_and_cannot_be_restored(tmp_path: Path) -> None:
    project = _secret_project(tmp_path / "p", ["Ada-Lovelace-1815"])
    _remove(project, where="contains(input, 'Lovelace')", because="she asked", purge=True)
    listener = Listener()
    assert _add(project, "all.jsonl", listener=listener).added == 0
    assert any("purged on" in warned and "she asked" in warned for warned in listener.warned)
    with pytest.raises(UserError, match=r"Nothing was added: .* purged and cannot be restored"):
        _add(project, "all.jsonl", restore=True)


def test_version_with_purged_rows_is_refused_but_compared(tmp_path: Path) -> None:
    project = _secret_project(tmp_path / "p", ["Ada-Lovelace-1815"])
    old = load_version(project.dataset).digest
    _remove(project, where="contains(input, 'Lovelace')", because="she asked", purge=True)
    with pytest.raises(UserError, match=r"is incomplete: 1 row purged on .*: she asked"):
        checkout(project.dataset, old)
    before = load_version(project.dataset, old, without_purged=True)
    found = diff(before, load_version(project.dataset))
    assert (len(found.removed), len(found.purged)) == (0, 1)


def test_purge_lists_files_with_the_text(tmp_path: Path) -> None:
    project = _secret_project(tmp_path / "p", ['Ada "Countess" Lovelace'])
    (project.root / "evaluations").mkdir()
    (project.root / "evaluations" / "report.html").write_text(
        "<p>my name is Ada &quot;Countess&quot; Lovelace and I lost it"
    )
    (project.root / "old.csv").write_text('"my name is Ada ""Countess"" Lovelace and I lost it",x\n')
    (project.root / "copy.parquet").write_bytes(b"PAR1 anything")
    (project.root / "other.txt").write_text("my name is Ada")
    listener = Listener()
    result = _remove(project, listener, where="contains(input, 'Lovelace')", because="she asked", purge=True)
    found = {holder.path: holder.rows for holder in result.holders if ".git" not in holder.path}
    assert found == {"all.jsonl": 1, "copy.parquet": None, "evaluations/report.html": 1, "old.csv": 1}
    assert list(found) == sorted(found)
    assert any("all.jsonl: text of 1 row" in warned for warned in listener.warned)


def test_purge_lists_groups_in_members_of_old_versions(project: ProjectFolder) -> None:
    listener = Listener()
    result = _remove(project, listener, groups=("customer=C3",), because="C3 asked", purge=True)
    [holder] = [h for h in result.holders if "members.tsv" in h.path]
    assert (holder.rows, "customer=C3" in holder.note) == (2, True)
    assert any("customer=C3" in warned for warned in listener.warned)


def test_purge_lists_remaining_rows_with_the_same_input(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {conflicts: accept}\n")
    write_jsonl(
        project.root / "all.jsonl",
        [*unlike_pairs(40), ("the same question as ever", "yes"), ("the same question as ever", "no")],
    )
    _add(project, "all.jsonl")
    result = _remove(project, where="output == 'yes'", because="asked", purge=True)
    assert [m.example.output for m in load_version(project.dataset).members if m.key in result.same_input] == ["no"]


def test_purge_lists_the_source_file_of_templated_rows(tmp_path: Path) -> None:
    config = 'data: {input: "{% for word in words %}{{ word }} {% endfor %}", output: "{{ code }}"}\n'
    project = new_project(tmp_path / "p", config)
    rows = [{"words": text.split(), "code": int(answer.split()[1])} for text, answer in unlike_pairs(40)]
    write_rows(project.root / "words.jsonl", rows)
    _add(project, "words.jsonl")
    key = _train_rows(project, 1)[0]
    line = _remove(project, where=f"key == '{key}'", dry_run=True).rows[0].line
    listener = Listener()
    [holder] = [h for h in _remove(project, listener, where=f"key == '{key}'", purge=True).holders if h.path[0] == "w"]
    assert (holder.path, holder.rows) == ("words.jsonl", 1)
    assert f"words.jsonl: text of 1 row (read from it at line {line}, with other text)" in "".join(listener.warned)


def test_find_copies_matches_a_plain_search_across_chunks(tmp_path: Path) -> None:
    project = _secret_project(tmp_path / "p", ["Grace-Hopper-1906"])
    row = next(m for m in load_version(project.dataset).members if "Hopper" in m.example.input_text)
    text = row.example.input_text.encode()
    for shift in range(-len(text), 2):
        (project.root / f"big{shift}.txt").write_bytes(b"x" * ((1 << 20) + shift) + text)
    (project.root / "all.jsonl").unlink()
    found = [h for h in find_copies(project.root, project.dataset, [row.example], Listener()) if h.rows]
    assert len(found) == len(text) + 2


# Purge of metadata


def _row(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def _add_rows(project: ProjectFolder, name: str, rows: list[dict[str, Any]], **options: Any) -> AddResult:
    path = project.root.parent / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return add(project, [path], Listener(), AddOptions(**options))


def _with_metadata(root: Path, config: str = "") -> ProjectFolder:
    """A project of three versions whose files, outside of it, had metadata; the rows of Zoë stand in all three."""
    project = new_project(root / "p", config)
    rows = [_row(q, a, id=f"id-{n}") for n, (q, a) in enumerate(unlike_pairs(60))]
    secret = _row(
        "my name is Zoë-Lovelace and I lost it", "sorry, Zoë-Lovelace!", id="ticket-of-zoë", meta={"at": "zoë@x"}
    )
    again = {**secret, "id": "ticket-of-zoë-again"}
    _add_rows(project, "first.jsonl", [*rows[:40], secret, again])
    _add_rows(project, "second.jsonl", [*rows[40:50], {**secret, "id": "ticket-of-zoë-later"}])
    _add_rows(project, "third.jsonl", rows[50:])
    return project


def _purge_zoë(project: ProjectFolder, **options: Any) -> RemoveResult:
    return _remove(project, where="contains(input, 'Zoë')", because="asked", purge=True, **options)


def test_purge_erases_metadata_from_every_version_and_keeps_that_of_other_rows(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    cached = project.work / "suspects" / "0123456789abcdef.json"
    cached.parent.mkdir()
    cached.write_text(json.dumps({"suspects": [{"detail": 'the same input has the answer "sorry, Zoë-…"'}]}))
    assert len([name for name in _holding(project.root, "zoë") if name.endswith("imports.jsonl")]) == 2
    before = [(m.digest, m.parent, m.counts) for m in list_versions(project.dataset)]
    listener = Listener()
    result = _purge_zoë(project, listener=listener)
    assert result.holders == ()
    assert [_holding(project.root, text) for text in ("zoë", "Zoë", "Zo\\u00eb")] == [[], [], []]
    assert "Deleted 1 cached list of suspects, because they quote rows." in listener.said
    assert verify(OpenFolder(project, Listener())).damage == ()
    assert [(m.digest, m.parent, m.counts) for m in list_versions(project.dataset)][:3] == before
    assert len(metadata_by_key(project.dataset, load_version(project.dataset).manifest)) == 60


def test_purge_of_earlier_rows_returns_the_manifest_on_disk(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    first = list_versions(project.dataset)[0]
    _remove(project, where="contains(input, 'Zoë')", because="wrong")
    result = _purge_zoë(project)
    assert (result.created, result.version) == (False, load_version(project.dataset).manifest)
    assert list_versions(project.dataset)[0].seal != first.seal
    assert verify(OpenFolder(project, Listener())).ok


@pytest.mark.parametrize("config", ["", "data: {duplicates: drop}\n"])
def test_purge_erases_metadata_of_duplicates(tmp_path: Path, config: str) -> None:
    project = new_project(tmp_path / "p", config)
    rows = [_row(q, a) for q, a in unlike_pairs(40)]
    text = "my name is Zoë-Lovelace and I lost my card on the way to the station"
    alike = [_row(f"{text}{end}", "sorry", id=f"zoë{n}") for n, end in enumerate(("", ".", "!"))]
    _add_rows(project, "a.jsonl", [*rows, *alike, _row(text.upper(), "sorry", id="zoë-3")])
    _remove(project, where="output == 'sorry'", because="asked", purge=True)
    assert _holding(project.root, "zoë") == []
    assert verify(OpenFolder(project, Listener())).ok


def test_purge_erases_metadata_of_replaced_rows(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    new = _row("my name is Zoë-Lovelace and I lost it", "mended", id="zoë-mended")
    _add_rows(project, "mended.jsonl", [new], replace=True)
    version = load_version(project.dataset)
    [member] = [m for m in version.members if m.example.output == "mended"]
    assert metadata_by_key(project.dataset, version.manifest)[member.key] == {"id": "zoë-mended"}
    _purge_zoë(project)
    assert _holding(project.root, "zoë") == []


def test_metadata_of_skipped_rows_is_not_stored(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    _purge_zoë(project)
    result = _add_rows(
        project,
        "again.jsonl",
        [
            *(_row(q, a) for q, a in unlike_pairs(5, seed=4)),
            _row("my name is Zoë-Lovelace and I lost it", "sorry, Zoë-Lovelace!", id="ticket-of-zoë"),
        ],
    )
    assert (result.added, len(result.removed)) == (5, 1)
    assert _holding(project.root, "zoë") == []


def test_purge_does_not_seal_changed_imports(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    folder = version_folder(project.dataset, list_versions(project.dataset)[0].digest)
    path = folder / "imports.jsonl"
    path.write_text(path.read_text().replace('"id":"id-3"', '"id":"id-4"'))
    manifest = (folder / "manifest.json").read_bytes()
    _purge_zoë(project)
    assert _holding(project.root, "zoë") == []
    assert (folder / "manifest.json").read_bytes() == manifest
    [damage] = verify(OpenFolder(project, Listener())).damage
    assert "The import records were changed" in damage.what


def test_where_query_sees_metadata(tmp_path: Path) -> None:
    project = _with_metadata(tmp_path)
    result = _remove(project, where="metadata.id == 'id-17' || contains(metadata.meta.at || '', 'zoë')")
    assert sorted(row.document["metadata"]["id"] for row in result.rows) == ["id-17", "ticket-of-zoë-later"]
