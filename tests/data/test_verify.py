"""`data verify` finds every damage there is, and says where and whose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st
from review_helpers import judge_next, review

from making.property_examples import examples
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.verify import verify
from tunewright.data.versions import checkout, list_versions, load_version, short, version_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with two versions, 60 and 75 rows, and some reviews; tests work on copies."""
    root = tmp_path_factory.mktemp("verify")
    project = new_project(root / "p")
    for name, count, seed in (("first", 60, 1), ("second", 15, 2)):
        add(project, [write_jsonl(root / f"{name}.jsonl", unlike_pairs(count, seed))], Listener(), message=name)
    judge_next(review(project), "right", "wrong", "skip", "right")
    return project


@pytest.fixture
def project(pristine: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    """A copy to be damaged."""
    shutil.copytree(pristine.root, tmp_path / "p")
    return ProjectFolder(tmp_path / "p")


def _flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def _files(dataset: Path) -> list[Path]:
    return sorted(p for p in dataset.rglob("*") if p.is_file())


def test_verify_finds_no_damage_in_an_intact_dataset(project: ProjectFolder) -> None:
    listener = Listener()
    found = verify(OpenFolder(project, listener))
    assert (found.ok, found.rows, found.versions, found.unsealed) == (True, 75, 2, ())
    assert (found.reviews, found.undigested) == (5, 0)
    done, total = listener.steps["verifying"]
    assert done == total > 2
    assert json.loads(json.dumps(found.as_dict()))["ok"] is True


@examples(150)
@given(data=st.data())
def test_verify_finds_a_flipped_bit_anywhere(pristine: ProjectFolder, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(_files(pristine.dataset)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    _flip(path, at, data.draw(st.integers(0, 7)))
    try:
        damage = verify(OpenFolder(pristine, Listener())).damage
    finally:
        path.write_bytes(whole)
    assert any(d.where.startswith(str(path)) for d in damage)


@examples(100)
@given(data=st.data())
def test_verify_names_line_and_row_of_a_flipped_bit(pristine: ProjectFolder, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(pristine.dataset.glob("rows/*.jsonl"))))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    number = data.draw(st.integers(0, len(lines) - 1))
    inside = data.draw(st.integers(0, len(lines[number]) - 2))
    key = json.loads(lines[number])["key"]
    needed = {m.digest for m in list_versions(pristine.dataset)} - (
        set()
        if key in {m.key for m in load_version(pristine.dataset, _first(pristine)).members}
        else {_first(pristine)}
    )
    _flip(path, sum(map(len, lines[:number])) + inside, data.draw(st.integers(0, 7)))
    try:
        damage = verify(OpenFolder(pristine, Listener())).damage
    finally:
        path.write_bytes(whole)
    mine = [d for d in damage if d.where == f"{path}:{number + 1}"]
    assert len(mine) == 1
    # A key that no longer parses is reported again, by the versions that miss it.
    if key in mine[0].rows:
        assert set(mine[0].versions) == needed
    else:
        assert any(key in d.rows for d in damage)


def _first(project: ProjectFolder) -> str:
    return list_versions(project.dataset)[0].digest


def test_verify_collects_all_damage(project: ProjectFolder) -> None:
    rows = load_version(project.dataset).members
    changed = [m for m in rows if m.key[:2] != rows[0].key[:2]][:3]
    for member in changed:
        path = project.dataset / "rows" / f"{member.key[:2]}.jsonl"
        path.write_text(path.read_text().replace(member.example.output, "something else"))
    (project.dataset / "rows" / f"{rows[0].key[:2]}.jsonl").unlink()
    (version_folder(project.dataset, _first(project)) / "imports.jsonl").unlink()
    (project.dataset / "HEAD").write_text("0" * 64)
    found = verify(OpenFolder(project, Listener()))
    reported = [key for d in found.damage for key in d.rows]
    assert {m.key for m in changed} | {rows[0].key} <= set(reported)
    assert {Path(d.where).name for d in found.damage} >= {"imports.jsonl", "HEAD"}
    assert not found.ok
    assert short(rows[0].key) in "\n".join(map(str, found.damage))


def test_verify_names_changed_members_and_dependent_versions(project: ProjectFolder) -> None:
    path = version_folder(project.dataset, _first(project)) / "members.tsv"
    path.write_text(path.read_text().replace("\ttrain\t", "\ttest\t", 1))
    (damage,) = verify(OpenFolder(project, Listener())).damage
    assert (damage.where, damage.versions) == (
        str(path),
        tuple(sorted(m.digest for m in list_versions(project.dataset))),
    )


def test_verify_reports_a_missing_parent(project: ProjectFolder) -> None:
    first, second = _first(project), load_version(project.dataset).digest
    shutil.rmtree(version_folder(project.dataset, first))
    damage = verify(OpenFolder(project, Listener())).damage
    assert [(short(first) in str(d), d.versions) for d in damage] == [(True, (second,))] * 2


def test_verify_accepts_versions_of_earlier_releases_as_unsealed(project: ProjectFolder) -> None:
    path = version_folder(project.dataset, _first(project)) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("author", "imports", "seal")}))
    found = verify(OpenFolder(project, Listener()))
    assert found.ok
    assert found.unsealed == (_first(project),)


def test_verify_names_changed_import_records_and_manifests(project: ProjectFolder) -> None:
    folder = version_folder(project.dataset, _first(project))
    imports, manifest = folder / "imports.jsonl", folder / "manifest.json"
    whole = imports.read_text()

    def where() -> list[str]:
        return [d.where for d in verify(OpenFolder(project, Listener())).damage]

    imports.write_text(whole + "half a rec\n")
    assert where() == [f"{imports}:{whole.count(chr(10)) + 1}"]
    imports.write_text(whole.replace("first.jsonl", "other.jsonl"))
    assert where() == [str(imports)]
    imports.unlink()
    manifest.write_text(manifest.read_text().replace('"first"', '"other"'))
    assert where() == [str(manifest), str(imports)]


def test_verify_names_changed_and_half_reviews(project: ProjectFolder) -> None:
    path = project.dataset / "reviews.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"wrong"', '"right"')
    path.write_text("".join(lines) + lines[1][:40])
    found = verify(OpenFolder(project, Listener()))
    assert [d.where for d in found.damage] == [f"{path}:3", f"{path}:6"]
    assert "its digest does not match" in found.damage[0].what
    assert "Half a review" in found.damage[1].what
    assert found.reviews == 4


def test_verify_counts_reviews_of_earlier_releases(project: ProjectFolder) -> None:
    path = project.dataset / "reviews.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{k: v for k, v in event.items() if k not in ("digest", "nth")} for event in events]
    write_rows(path, old)
    found = verify(OpenFolder(project, Listener()))
    assert (found.ok, found.reviews, found.undigested) == (True, 5, 5)


def test_checkout_makes_an_earlier_version_current(project: ProjectFolder) -> None:
    second = load_version(project.dataset)
    assert checkout(project.dataset, _first(project)[:8]).digest == load_version(project.dataset).digest
    checkout(project.dataset, second.digest)
    assert load_version(project.dataset) == second


def test_add_after_a_checkout_builds_on_the_earlier_version(project: ProjectFolder, tmp_path: Path) -> None:
    first = _first(project)
    checkout(project.dataset, first)
    add(project, [write_jsonl(tmp_path / "third.jsonl", unlike_pairs(15, 3))], Listener())
    third = load_version(project.dataset)
    assert (third.manifest.parent, len(third.members)) == (first, 75)
    assert verify(OpenFolder(project, Listener())).versions == 3


def test_checkout_refuses_a_version_that_is_unknown_or_damaged(project: ProjectFolder, tmp_path: Path) -> None:
    head = (project.dataset / "HEAD").read_text()
    for unknown in ("fffffff0", "xyz", ""):
        with pytest.raises(UserError, match=f"with {unknown!r}"):
            checkout(project.dataset, unknown)
    (version_folder(project.dataset, _first(project)) / "members.tsv").write_text("")
    with pytest.raises(UserError, match="The members were changed"):
        checkout(project.dataset, _first(project))
    assert (project.dataset / "HEAD").read_text() == head
    for verb in (
        lambda: checkout(tmp_path / "none", "abc"),
        lambda: verify(OpenFolder(ProjectFolder(tmp_path), Listener())),
    ):
        with pytest.raises(UserError, match="data add FILE"):
            verb()
    assert not (tmp_path / "none").exists()
