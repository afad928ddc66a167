"""The generic mix-in: drawn by the seed, clean of what is measured, versioned, and never held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import Listener, Pair, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.review.suspects import AnswerLoss, find_suspects
from tunewright.data.trace import blame
from tunewright.data.versions import DatasetVersion, load_version, version_folder
from tunewright.data.versions.diff import diff

MIXED = "data:\n  mix: {source: generic.jsonl, fraction: 0.2}\n"
GENERIC = [
    (f"How would one explain {text} to a child?", f"Well, {answer}.") for text, answer in unlike_pairs(80, seed=9)
]


def _project(root: Path, generic: list[Pair], config: str = MIXED) -> ProjectFolder:
    project = new_project(root, config)
    write_jsonl(root / "generic.jsonl", generic)
    return project


def _add(project: ProjectFolder, pairs: list[Pair], listener: Listener | None = None) -> AddResult:
    return add(project, [write_jsonl(project.root / "pairs.jsonl", pairs)], listener or Listener())


def _mixed(version: DatasetVersion) -> set[str]:
    return {m.key for m in version.members if m.mixed}


def test_mix_fraction_is_of_training_rows_only(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", GENERIC)
    result = _add(project, unlike_pairs(100))
    version = load_version(project.dataset)
    mixed = [m for m in version.members if m.mixed]
    assert {m.split for m in mixed} == {"train"}
    assert len(mixed) == result.version.counts.mixed == 20
    assert len(mixed) / len(version.examples("train")) == pytest.approx(0.2)
    assert len(version.domain) == 100
    mix = result.version.mix
    assert mix is not None
    assert (mix.source.name, mix.drawn, mix.left_out, mix.fraction) == ("generic.jsonl", 20, 0, 0.2)
    assert {m.example.output for m in mixed} <= {output for _, output in GENERIC}


def test_mix_draw_depends_on_the_seed(tmp_path: Path) -> None:
    projects = [_project(tmp_path / f"{seed}", GENERIC, f"seed: {seed}\n{MIXED}") for seed in (1, 2)]
    one, other = (_mixed(load_version(p.dataset)) for p in projects if _add(p, unlike_pairs(100)))
    assert one != other


def test_mix_draw_of_a_larger_version_extends_the_smaller_one(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", GENERIC)
    _add(project, unlike_pairs(100))
    before = load_version(project.dataset)
    _add(project, unlike_pairs(160))
    after = load_version(project.dataset)
    assert _mixed(before) < _mixed(after)
    assert not any(m.mixed for m in diff(before, after).removed)


def test_mix_excludes_held_out_rows_near_ones_and_benchmark_items(tmp_path: Path) -> None:
    pairs = unlike_pairs(100)
    plain = new_project(tmp_path / "plain")
    _add(plain, pairs)
    test = [m.example.input_text for m in load_version(plain.dataset).examples("test")]
    bad = [
        (test[0], "the same input"),
        (test[1] + ".", "nearly the same input"),
        (f"Please think about this first: {test[2]} and then tell me what you think.", "it is in there"),
        ("What is the name of the largest lake in the north?", "an item"),
        (f"Log in with {'AKIA' + 'Q3EGRZ7XK5YDHWVN'} and continue", "a secret"),
    ]
    project = _project(tmp_path / "p", [*bad, *GENERIC[:12]], f"{MIXED}  benchmarks: [items.jsonl]\n")
    (project.root / "items.jsonl").write_text('{"question": "The name of the largest lake in the north?"}\n' * 2)
    listener = Listener()
    result = _add(project, pairs, listener)
    version = load_version(project.dataset)
    assert {m.example.output for m in version.members if m.mixed} == {output for _, output in GENERIC[:12]}
    assert result.version.mix is not None
    assert result.version.mix.left_out == len(bad)
    [reported] = [warning for warning in listener.warned if "of the mix-in rejected" in warning]
    for line in range(1, 6):
        assert f"generic.jsonl:{line}: " in reported
    assert "AKIA" not in reported
    assert any("has only 12 usable rows to mix in (data.mix asks for 20)" in warning for warning in listener.warned)
    records = (version_folder(project.dataset, version.digest) / "imports.jsonl").read_text(encoding="utf-8")
    assert sum(json.loads(line)["fate"] == "not mixed" for line in records.splitlines()) == len(bad)


def test_mix_row_becomes_a_domain_row_when_added(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", GENERIC)
    _add(project, unlike_pairs(100))
    row = next(m for m in load_version(project.dataset).members if m.mixed)
    result = _add(project, [*unlike_pairs(100), (row.example.input_text, row.example.output)])
    assert result.added == 1
    after = next(m for m in load_version(project.dataset).members if m.key == row.key)
    assert not after.mixed


def test_suspects_excludes_the_mix_and_blame_names_its_file(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", [*GENERIC, (GENERIC[0][0], "another answer")])
    _add(project, unlike_pairs(100))
    version = load_version(project.dataset)
    losses = {m.key: AnswerLoss(1.0, 1.0) for m in version.domain}
    assert find_suspects(version, Listener(), losses=losses).suspects
    row = next(m for m in version.members if m.mixed)
    found = blame(project.dataset, version, row.key)
    assert found.source == "generic.jsonl"
    assert found.line is not None
    assert GENERIC[found.line - 1][1] == row.example.output


def test_imports_record_only_new_rows_of_the_mix(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", GENERIC)
    drawn = []
    for count in (100, 160):
        version = _add(project, unlike_pairs(count)).version
        records = (version_folder(project.dataset, version.digest) / "imports.jsonl").read_text(encoding="utf-8")
        drawn.append(sum(json.loads(line)["fate"] == "mixed" for line in records.splitlines()))
    assert drawn == [20, 12]


def test_mix_removed_from_the_config_leaves_the_next_version(tmp_path: Path) -> None:
    project = _project(tmp_path / "p", GENERIC)
    _add(project, unlike_pairs(100))
    (project.root / "tunewright.yaml").write_text("")
    result = _add(ProjectFolder(project.root), unlike_pairs(100))
    assert result.created
    assert (result.version.counts.mixed, result.version.mix) == (0, None)


@pytest.mark.parametrize(
    ("generic", "message"),
    [([], "The file has no rows"), ([("a", "")], "an empty answer"), ([unlike_pairs(3)[0]] * 3, "can be mixed in")],
)
def test_mix_is_refused_when_unusable(tmp_path: Path, generic: list[Pair], message: str) -> None:
    project = _project(tmp_path / "p", generic)
    with pytest.raises(UserError, match=message):
        _add(project, unlike_pairs(100))
    assert not (project.dataset / "HEAD").exists()
