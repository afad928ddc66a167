"""`data check FILE` says what `data add` would do, reason for reason and number for number, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_rows

from making.command_line import tunewright
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.preview import Effect, check_files
from tunewright.data.remove import remove
from tunewright.data.versions import load_version


def _rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": q, "completion": a} for q, a in unlike_pairs(count, seed=seed)]


def _effect(project: ProjectFolder, path: Path) -> Effect:
    effect = check_files(OpenFolder(project, Listener()), [path]).effect
    assert effect is not None
    return effect


def _everything(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("duplicates", "added", "kept", "dropped"), [("keep", 21, 1, 0), ("drop", 20, 0, 1)])
def test_preview_has_the_numbers_of_add_and_writes_nothing(
    tmp_path: Path, duplicates: str, added: int, kept: int, dropped: int
) -> None:
    project = new_project(tmp_path / "p", f"data: {{duplicates: {duplicates}}}\n")
    rows = _rows(60)
    add(project, [write_rows(tmp_path / "old.jsonl", rows[:40])], Listener())
    near = {**rows[50], "prompt": rows[50]["prompt"] + "s"}
    spaced = {**rows[46], "prompt": f" {rows[46]['prompt'].upper()}"}  # another pair key, and an exact duplicate
    path = write_rows(tmp_path / "new.jsonl", [*rows[30:], rows[45], spaced, near])
    before = _everything(project.root)
    found = check_files(OpenFolder(project, Listener()), [path])
    assert _everything(project.root) == before
    assert found.ok
    effect = _effect(project, path)
    result = add(project, [path], Listener())
    assert (effect.added, effect.known, effect.conflicts) == (result.added, result.known, 0) == (added, 10, 0)
    assert (effect.exact_duplicates, effect.near_kept, effect.near_dropped) == (2, kept, dropped)
    assert effect.exact_duplicates + effect.near_dropped == len(result.duplicates)
    version = load_version(project.dataset)
    for size in effect.splits:
        members = [m for m in version.members if m.split == size.split]
        assert (size.rows, size.clusters) == (len(members), len({m.cluster for m in members}))
    assert sum(size.new for size in effect.splits) == added


def test_preview_counts_rows_that_were_removed_earlier(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = _rows(60)
    path = write_rows(tmp_path / "all.jsonl", rows)
    add(project, [path], Listener())
    where = "split == 'train' && contains(output, '1')"
    gone = remove(OpenFolder(project, Listener()), RemoveOptions(because="wrong", where=where)).rows
    effect = _effect(project, path)
    assert (effect.removed, effect.added, effect.known) == (len(gone), 0, 60 - len(gone))


def test_preview_collects_every_error_of_add(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = [*_rows(30), {"promt": "a", "completion": "b"}, {"prompt": "x", "completion": "password: hunter2"}]
    rows.append({**rows[0], "completion": "another"})
    path = write_rows(tmp_path / "new.jsonl", rows)
    found = check_files(OpenFolder(project, Listener()), [path])
    assert not found.ok
    reported = [refusal.what.splitlines()[0] for refusal in found.refusals]
    assert reported == [
        "1 faulty row, nothing would be added",
        "1 secret in 1 row, nothing would be added (password: 1)",
        "1 input with different outputs, nothing would be added",
    ]
    assert found.effect is not None
    assert found.effect.conflicts == 1
    for refusal, skip, cut in zip(
        found.refusals, (False, True, True), (rows, rows, [*rows[:31], rows[32]]), strict=True
    ):
        with pytest.raises(UserError) as caught:
            add(project, [write_rows(path, cut)], Listener(), AddOptions(skip_bad=skip))
        assert caught.value.what.splitlines()[0] == refusal.what.splitlines()[0].replace("would be", "was")
    assert not project.dataset.exists() or not list(project.dataset.glob("versions/*"))


def test_preview_includes_the_error_for_too_few_rows(tmp_path: Path) -> None:
    found = check_files(
        OpenFolder(new_project(tmp_path / "p"), Listener()), [write_rows(tmp_path / "a.jsonl", _rows(3))]
    )
    assert (found.ok, found.effect) == (False, None)
    assert "in 3 clusters" in found.refusals[0].what


def test_fault_of_a_table_names_line_and_column(tmp_path: Path) -> None:
    project, bad = new_project(tmp_path / "p"), tmp_path / "bad.csv"
    bad.write_text("prompt,completion\n" + "".join(f"{row['prompt']},yes\n" for row in _rows(30)) + ",no\n")
    reported = tunewright("data", "check", bad, "-p", project.root)
    assert f"{bad}:32: an empty user turn [E401, column prompt]\n" in reported.stdout
    (fault,) = tunewright("data", "check", bad, "-p", project.root, "--json").document["faults"]
    assert (fault["line"], fault["column"], fault["path"]) == (32, "prompt", "$.prompt")


def test_check_command_prints_causes_and_splits_with_the_exit_code_of_add(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    bad = write_rows(tmp_path / "bad.jsonl", [*_rows(30), *[{"promt": "a", "completion": "b"}] * 5])
    reported = tunewright("data", "check", bad, "-p", project.root)
    text = " ".join((reported.stderr + reported.stdout).split())
    assert reported.code == 2
    assert '5 rows: unknown key "promt", did you mean "prompt"? [E201 $.promt]' in text
    assert f"{bad}:31, {bad}:32, {bad}:33 and 2 more" in text
    assert "would refuse these files (exit code 2). Nothing was written." in text
    document = tunewright("data", "check", bad, "-p", project.root, "--json").document
    assert len(document["faults"]) == 5
    assert [split["rows"] for split in document["effect"]["splits"]] == [24, 3, 3]
    good = write_rows(tmp_path / "good.jsonl", _rows(30))
    reported = tunewright("data", "check", good, "-p", project.root)
    assert reported.code == 0
    assert "30 examples in 1 file\nnew 30\n" in reported.stdout and "would add these files" in reported.stdout
    assert not project.dataset.exists()


@pytest.mark.parametrize(("setting", "warned"), [("error", False), ("accept", True)])
def test_preview_warns_of_conflicts_only_when_accepted(tmp_path: Path, setting: str, warned: bool) -> None:
    project = new_project(tmp_path / "p", f"data: {{conflicts: {setting}}}\n")
    rows = _rows(30)
    listener = Listener()
    found = check_files(
        OpenFolder(project, listener), [write_rows(tmp_path / "a.jsonl", [*rows, {**rows[0], "completion": "another"}])]
    )
    assert any("all kept" in warning for warning in listener.warned) is warned
    assert bool(found.refusals) is not warned


def test_check_command_has_the_numbers_of_add_with_its_options(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = _rows(40)
    add(project, [write_rows(tmp_path / "old.jsonl", rows[:36])], Listener())
    gone = RemoveOptions(because="wrong", where="split == 'train' && contains(output, '1')")
    removed = len(remove(OpenFolder(project, Listener()), gone).rows)
    stays = next(
        row for row in rows if row["completion"] in {m.example.output for m in load_version(project.dataset).members}
    )
    bad, secret = {"promt": "a", "completion": "b"}, {**rows[39], "password": "hunter2xyz!"}
    mended = {**stays, "completion": "mended"}
    path = write_rows(tmp_path / "new.jsonl", [*(row for row in rows[:39] if row != stays), secret, bad, mended])
    options = ("--skip-bad", "--redact", "--replace", "--restore")
    plain = tunewright("data", "check", path, "-p", project.root)
    assert plain.code == 2
    assert "use --replace" in " ".join((plain.stderr + plain.stdout).split())
    for some in (options[1:], (options[0], *options[2:]), (*options[:2], options[3])):
        assert tunewright("data", "check", path, *some, "-p", project.root).code == 2
    before = _everything(project.root)
    checked = tunewright("data", "check", path, *options, "-p", project.root, "--json")
    assert checked.code == 0
    assert _everything(project.root) == before
    effect = checked.document["effect"]
    added = tunewright("data", "add", path, *options, "-p", project.root, "--json").document
    assert (effect["added"], effect["known"]) == (added["added"], added["known"])
    assert (effect["added"], effect["replaced"], effect["removed"]) == (4 + removed, 1, 0)
    assert [size["rows"] for size in effect["splits"]] == [
        added["version"]["counts"][s["split"]] for s in effect["splits"]
    ]


def test_check_command_refuses_options_without_effect(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    path = write_rows(tmp_path / "a.jsonl", _rows(30))
    fixed = tunewright("data", "check", path, "--fix", tmp_path / "b.jsonl", "--replace", "-p", project.root)
    assert (fixed.code, "--fix does not use --replace" in fixed.stderr) == (2, True)
    copy = tmp_path / "c.jsonl"
    left = tunewright("data", "check", path, "--fix", copy, "--leave-out", "3", "-p", project.root)
    assert (left.code, "a.jsonl:3: left out, as chosen" in left.stdout) == (0, True)
    assert len(copy.read_text().splitlines()) == 29
    assert tunewright("data", "add", path, "-p", project.root).code == 0
    version = tunewright("data", "check", "--skip-bad", "-p", project.root)
    assert (version.code, "--skip-bad requires files" in version.stderr) == (2, True)


def test_conflict_refusal_is_short_and_the_json_lists_all_when_most_inputs_have_references(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    start = "one attribute that all of them have, and then another, and a third "
    rows = [(f"{start}{i} {text}", f"{i} {j}") for i, (text, _) in enumerate(unlike_pairs(30)) for j in range(9)]
    path = write_rows(project.root / "pairs.jsonl", [{"prompt": text, "completion": answer} for text, answer in rows])
    found = check_files(OpenFolder(project, Listener()), [path])
    [refusal] = found.refusals
    assert "Every input has several outputs. If these are alternative references" in str(refusal)
    assert (str(refusal).count(start), str(refusal).count("and 6 more outputs")) == (3, 3)
    assert "and 27 more: `tunewright data check FILE --json` lists all" in str(refusal)
    listed = found.as_dict()["conflicts"]
    assert (len(listed), {len(conflict["outputs"]) for conflict in listed}) == (30, {9})
