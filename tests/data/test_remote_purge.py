"""Removals and purges travel: no pull restores text, and a push erases it there, in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl, write_rows
from remote_helpers import Place, add_rows, pull_from, push_to

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import RemoveOptions
from tunewright.data.remote import RemoteStore
from tunewright.data.remove import RemoveResult, remove
from tunewright.data.review.reviews import VerdictEvent, append_reviews
from tunewright.data.verify import verify
from tunewright.data.versions import load_version
from tunewright.data.versions.logs import read_removals

pytest_plugins = ["remote_helpers"]

SECRET = "my name is Ada Lovelace and I lost my card"


def _with_secret(project: ProjectFolder) -> str:
    path = write_jsonl(project.root.parent / "secret.jsonl", [(SECRET, "sorry to hear that"), *unlike_pairs(10, 9)])
    add(project, [path], Listener(), message="with a name")
    return next(m.key for m in load_version(project.dataset).members if m.example.input_text == SECRET)


def _purge(project: ProjectFolder) -> RemoveResult:
    where = "contains(input, 'Lovelace')"
    return remove(OpenFolder(project, Listener()), RemoveOptions(because="she asked", where=where, purge=True))


def _has_text(project: ProjectFolder) -> bool:
    return any(b"Lovelace" in path.read_bytes() for path in project.dataset.rglob("*") if path.is_file())


def _edit(project: ProjectFolder, key: str) -> None:
    when = "2026-11-25T10:00:00.000+00:00"
    output = "sorry, Countess Lovelace"
    edit = VerdictEvent(key=key, verdict="edit", output=output, version="0" * 64, reviewer="ada", when=when)
    append_reviews(project.dataset, [edit])


def test_push_and_pull_erase_purged_text(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    _edit(one, _with_secret(one))
    push_to(one, place)
    pull_from(two, place)
    assert _has_text(two)
    assert any(b"Lovelace" in data for data in place.files.values())
    _purge(one)
    push_to(one, place)
    assert [name for name, data in place.files.items() if b"Lovelace" in data] == []
    pull_from(two, place)
    assert not _has_text(two)
    for project in (one, two):
        found = verify(OpenFolder(project, Listener()))
        assert (found.damage, len(found.purges)) == ((), 1)
    assert load_version(two.dataset).digest == load_version(one.dataset).digest
    files = place.files
    push_to(two, place)
    assert place.files == files


def test_push_does_not_restore_purged_text(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    key = _with_secret(one)
    push_to(one, folder)
    pull_from(two, folder)
    names = one.root / "keys.txt"
    names.write_text(key)
    remove(OpenFolder(one, Listener()), RemoveOptions(because="wrong", keys=names))
    push_to(one, folder)
    pull_from(two, folder)
    _edit(two, key)
    # Purged without a new version: the row is in none that is current.
    _purge(one)
    push_to(one, folder)
    add_rows(two, 20, 6)
    assert _has_text(two)
    push_to(two, folder)
    assert [name for name, data in folder.files.items() if b"Lovelace" in data] == []
    pull_from(two, folder)
    assert not _has_text(two)


def test_removed_row_stays_out_in_the_other_copy(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    key = _with_secret(one)
    names = one.root / "keys.txt"
    names.write_text(key)
    remove(OpenFolder(one, Listener()), RemoveOptions(because="wrong", keys=names))
    push_to(one, folder)
    pull_from(two, folder)
    assert read_removals(two.dataset).out.keys() == {key}
    assert add(two, [one.root.parent / "secret.jsonl"], Listener()).added == 0


def test_interrupted_erasure_is_finished_by_the_next_push(
    one: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_secret(one)
    push_to(one, folder)
    _purge(one)
    write = RemoteStore.write

    def refuse(self: RemoteStore, name: str, data: bytes) -> None:
        if name.endswith("rows.jsonl") and b'"key"' in data and name in before:
            raise UserError("permission denied", where=name, fix="Ask for the right to write.")
        write(self, name, data)

    before = set(folder.files)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "write", refuse)
        with pytest.raises(UserError, match="Could not erase the text of purged rows on the remote: permission denied"):
            push_to(one, folder)
    assert any(b"Lovelace" in data for data in folder.files.values())
    push_to(one, folder)
    assert [name for name, data in folder.files.items() if b"Lovelace" in data] == []


def test_changed_log_of_removals_is_refused_and_reported_by_verify(
    one: ProjectFolder, two: ProjectFolder, folder: Place
) -> None:
    _with_secret(one)
    _purge(one)
    push_to(one, folder)
    [name] = [name for name in folder.files if name.startswith("removed/") and "all" not in name]
    folder.write(name, folder.files[name].replace(b"she asked", b"he asked"))
    with pytest.raises(UserError, match="The removal was changed"):
        pull_from(two, folder)
    log = one.dataset / "removed.jsonl"
    log.write_bytes(log.read_bytes().replace(b"she asked", b"he asked"))
    found = verify(OpenFolder(one, Listener()))
    assert any("removed.jsonl:1" in damage.where for damage in found.damage)


def test_failed_pull_keeps_the_current_version_complete(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    _with_secret(one)
    push_to(one, folder)
    pull_from(two, folder)
    before = load_version(two.dataset).digest
    new = _purge(one).version.digest[:12]
    push_to(one, folder)
    members = folder.files[f"versions/{new}/members.tsv"]
    folder.remove(f"versions/{new}/members.tsv")
    with pytest.raises(UserError, match="The file is missing"):
        pull_from(two, folder)
    assert load_version(two.dataset).digest == before
    folder.write(f"versions/{new}/members.tsv", members)
    pull_from(two, folder)
    assert not _has_text(two)


def test_verify_reports_restored_purged_text(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    write_jsonl(tmp_path / "all.jsonl", [*unlike_pairs(40), (SECRET, "sorry")])
    add(project, [tmp_path / "all.jsonl"], Listener())
    key = next(m.key for m in load_version(project.dataset).members if m.example.input_text == SECRET)
    shard = project.dataset / "rows" / f"{key[:2]}.jsonl"
    before = shard.read_bytes()
    _purge(project)
    shard.write_bytes(before)
    [damage] = verify(OpenFolder(project, Listener())).damage
    assert "was purged on" in damage.what
    assert damage.rows == (key,)


def _add_with_metadata(project: ProjectFolder) -> None:
    path = project.root.parent / "named.jsonl"
    rows = [{"prompt": p, "completion": c, "id": f"id-{n}"} for n, (p, c) in enumerate(unlike_pairs(10, 9))]
    rows.append({"prompt": SECRET, "completion": "sorry to hear that", "id": "countess-117"})
    write_rows(path, rows)
    add(project, [path], Listener())


def _metadata_there(folder: Place) -> list[str]:
    return [name for name, data in folder.files.items() if b"countess" in data]


def _metadata_here(project: ProjectFolder) -> bool:
    return any(b"countess" in path.read_bytes() for path in project.root.rglob("*") if path.is_file())


def test_push_and_pull_erase_the_metadata_of_purged_rows(
    one: ProjectFolder, two: ProjectFolder, tmp_path: Path, folder: Place
) -> None:
    _add_with_metadata(one)
    push_to(one, folder)
    pull_from(two, folder)
    assert _metadata_here(two)
    _purge(one)
    assert not _metadata_here(one)
    push_to(one, folder)
    assert _metadata_there(folder) == []
    pull_from(two, folder)
    assert not _metadata_here(two)
    fresh = new_project(tmp_path / "fresh")
    pull_from(fresh, folder)
    for project in (one, two, fresh):
        assert verify(OpenFolder(project, Listener())).ok
    manifests = [
        {path.parent.name: path.read_bytes() for path in project.dataset.glob("versions/*/manifest.json")}
        for project in (one, two, fresh)
    ]
    assert manifests[0] == manifests[1] == manifests[2]


def test_push_does_not_restore_purged_metadata(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    _add_with_metadata(two)
    _add_with_metadata(one)
    _purge(one)
    remove(OpenFolder(one, Listener()), RemoveOptions(because="wrong", where="source == 'named.jsonl'"))
    RemoteStore(folder.url, folder.options or None).write(
        "removed/all.jsonl", (one.dataset / "removed.jsonl").read_bytes()
    )  # the purge is there, and the version that lost its rows is not
    push_to(two, folder)
    assert _metadata_there(folder) == []
    assert verify(OpenFolder(two, Listener())).ok


def test_pull_reads_half_erased_metadata_and_the_next_push_finishes(
    one: ProjectFolder, two: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_with_metadata(one)
    push_to(one, folder)
    _purge(one)
    write = RemoteStore.write
    before = set(folder.files)

    def refuse(self: RemoteStore, name: str, data: bytes) -> None:
        if name.endswith("imports.jsonl") and name in before:
            raise UserError("permission denied", where=name, fix="Ask for the right to write.")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "write", refuse)
        with pytest.raises(UserError, match=r"Could not erase .* on the remote: permission denied"):
            push_to(one, folder)
    assert _metadata_there(folder) != []
    pull_from(two, folder)
    assert not _metadata_here(two)
    assert verify(OpenFolder(two, Listener())).ok
    push_to(one, folder)
    assert _metadata_there(folder) == []
