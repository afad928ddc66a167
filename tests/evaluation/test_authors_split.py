"""The origin of the items' split, and the contrast on the items that share no cluster with a training row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_items, scored_items
from making.versions import version_of
from tunewright.data.versions import DatasetVersion, Member
from tunewright.data.versions.version import GivenSplit
from tunewright.evaluation.authors_split import measure_authors_split
from tunewright.evidence.scoring import declared_contrasts

ITEMS = make_items(60)
SCORED = scored_items(ITEMS, ["exact_match"])
DECIDING = declared_contrasts(SCORED, [("tuned", "retrieved-4")], seed=0)[0]


def _version(near: int) -> tuple[DatasetVersion, list[Member]]:
    """A version with a test row for each item, of which the first ``near`` share their cluster with a training row."""
    version = version_of([2] * 60)
    names = sorted({m.cluster for m in version.members})
    pairs = [[m for m in version.members if m.cluster == name] for name in names]
    tests = [replace(pair[0], split="test", given="test" if i else None) for i, pair in enumerate(pairs)]
    trained = [replace(pair[1], cluster=pair[1].cluster if i < near else pair[1].key) for i, pair in enumerate(pairs)]
    about = GivenSplit(column="part", sources=("a.csv",), on_overlap="keep")
    manifest = version.manifest.model_copy(update={"given_split": about})
    trained = [m for m in trained if m.cluster not in {t.cluster for t in tests[near:]}]
    return DatasetVersion(manifest, (*tests, *trained)), tests


@pytest.mark.parametrize("near", [0, 20, 60])
def test_contrast_without_near_items_is_that_of_the_other_items(near: int, tmp_path: Path) -> None:
    version, tests = _version(near)
    found = measure_authors_split(tmp_path, version, tests, SCORED, DECIDING, seed=0)
    assert found is not None
    assert (found.source, found.given, found.items, found.near) == ("column part of a.csv", 59, 60, near)
    assert (found.far is None) == (near in (0, 60))
    if found.far is not None:
        right = {
            arm: np.array([item.answers[arm].strip() == item.reference for item in ITEMS[near:]])
            for arm in ("tuned", "retrieved-4")
        }
        assert found.far.scored == 60 - near
        assert found.far.difference == pytest.approx(right["tuned"].mean() - right["retrieved-4"].mean())


def test_drawn_split_is_nobodys(tmp_path: Path) -> None:
    version, tests = _version(0)
    drawn = DatasetVersion(version.manifest.model_copy(update={"given_split": None}), version.members)
    assert measure_authors_split(tmp_path, drawn, tests, SCORED, DECIDING, seed=0) is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep", "drop-train"])
def test_verdict_names_test_items_near_training_rows_where_these_are_kept(
    tmp_path: Path, tiny_base_folder: Path, mode: str
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [{**row, "part": "test" if n < 40 else "train"} for n, row in enumerate(pairs(120))]
    rows += [{**row, "prompt": f"{row['prompt']}0", "part": "train"} for row in rows[:12]]
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("data:\n", f"data:\n  split_column: part\n  on_overlap: {mode}\n")
    few = "  num_fewshot: [1]\n  static_seeds: 0\n  retrievers: [bm25]\n  tuned_retrieved: false\n  max_new_tokens: 4\n"
    config.write_text(text.replace("  num_fewshot: [1, 2]\n", few).replace("epochs: 2", "epochs: 1"))
    commands: list[tuple[str | Path, ...]] = [("data", "add", write_jsonl(folder / "pairs.jsonl", rows))]
    if mode == "drop-train":
        commands.append(("data", "remove", "--where", f"input == '{rows[20]['prompt']}'", "--because", "a part of it"))
    for command in (*commands, ("train",), ("evaluate",)):
        ran = tunewright(*command, "-p", folder)
        assert ran.code == 0, ran.stderr
    verdict = tunewright("verdict", "--json", "-p", folder).document
    left = 39 if mode == "drop-train" else 40
    whose = (
        f"The split is its authors' (column part of pairs.jsonl): they gave {left} of the {left} test items to test."
    )
    missing = " 1 row of theirs left out: the score compares with no published one." if left == 39 else ""
    assert whose + missing in verdict["reasons"]
    near = [reason for reason in verdict["reasons"] if "share a cluster with a training row" in reason]
    if mode == "drop-train":
        assert near == []
        return
    assert near[0].startswith("12 items share a cluster with a training row (data.on_overlap: keep). On the other 28: ")
    assert verdict["decision"] != "ship" or near[0].endswith("The gain holds there.")
