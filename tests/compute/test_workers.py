"""Datasets in parts: the same files, messages and progress as in one piece; and what a cluster needs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from compute_helpers import built, many_pairs, rows_alike, small_parts
from data_helpers import Listener, Pair, jaccard, unlike_pairs
from hypothesis import given
from hypothesis import strategies as st

from making.command_line import tiny_project, tunewright, write_jsonl
from making.pickled_workers import PickledWorkers
from making.property_examples import examples
from tunewright.config import ComputeConfig, Config
from tunewright.core.progress import LogTask
from tunewright.core.workers import THIS_PROCESS
from tunewright.data.dedup.similarity import link, nearest_kept
from tunewright.data.readers.row_errors import RowError
from tunewright.data.screening import screen


@examples(100, quick=12)
@given(rows_alike)
def test_dataset_is_the_same_in_parts(pairs: list[Pair]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        whole, heard = built(Path(folder, "whole"), pairs, THIS_PROCESS)
        small_parts(patch)
        parts, also_heard = built(Path(folder, "parts"), pairs, PickledWorkers())
    assert parts == whole
    assert also_heard.said == heard.said
    assert also_heard.warned == heard.warned
    assert also_heard.steps == heard.steps


@pytest.mark.slow
@pytest.mark.parametrize("sent", [0, 200_000])
def test_large_dataset_is_the_same_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    pairs = many_pairs(1500)
    whole, heard = built(tmp_path / "whole", pairs, THIS_PROCESS)
    monkeypatch.setattr("tunewright.data.dedup.similarity._ALIKE", 60)
    monkeypatch.setattr("tunewright.data.dedup.partition._FEW", 80)
    monkeypatch.setattr("tunewright.data.dedup.decontaminate._SENT", sent)
    parts, also_heard = built(tmp_path / "parts", pairs, PickledWorkers())
    assert parts == whole
    assert also_heard.steps == heard.steps


alike = st.lists(st.one_of(st.text("ab ", max_size=9), st.text("abcdef", min_size=10, max_size=14)), max_size=16)


@given(alike, st.sampled_from([0.2, 0.5, 2 / 3, 0.8, 1.0]), st.sampled_from([0, 60, 1 << 30]))
def test_links_found_in_parts_match_brute_force(texts: list[str], threshold: float, sent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        patch.setattr("tunewright.data.dedup.similarity._SENT", sent)  # more shingles are compared without a worker
        labels = link(texts, threshold, LogTask(), PickledWorkers()).tolist()
    assert labels == _components(texts, threshold)


def _components(texts: Sequence[str], threshold: float) -> list[int]:
    labels = list(range(len(texts)))
    for i, text in enumerate(texts):
        for j in range(i):
            if jaccard(text, texts[j]) >= threshold - 1e-12:
                low, high = sorted((labels[i], labels[j]))
                labels = [low if label == high else label for label in labels]
    return labels


@given(alike, st.integers(0, 4))
def test_nearest_kept_texts_are_the_same_in_parts(texts: list[str], kept: int) -> None:
    groups = np.array([len(text) % 3 for text in texts], dtype=np.int64)
    whole = nearest_kept(texts, groups, kept, 0.5, Listener(), "searching")
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        parts = nearest_kept(texts, groups, kept, 0.5, Listener(), "searching", PickledWorkers())
    for name in ("first", "second", "similarity"):
        assert getattr(parts, name).tolist() == getattr(whole, name).tolist()


@pytest.mark.parametrize("redact", [False, True])
def test_secrets_are_found_and_replaced_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, redact: bool
) -> None:
    from tunewright.config import DataConfig
    from tunewright.data.readers import read_pairs

    rows = [
        {"prompt": f"write to p{n}@uni-bonn.de", "completion": "yes", "by": f"q{n % 3}@uni-bonn.de"} for n in range(20)
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    read = read_pairs(file, DataConfig()).rows
    results = []
    for workers in (THIS_PROCESS, PickledWorkers()):
        heard = Listener()
        results.append(
            (screen(list(read), (), heard, redact=redact, presidio=None, workers=workers), heard.said, heard.warned)
        )
        monkeypatch.setattr("tunewright.data.pii.STEP", 3)
    assert results[0] == results[1]
    whole = results[0][0]
    assert (whole.redacted if redact else whole.personal) == {"email": 20}
    assert (read == whole.rows) is not redact


def test_row_error_is_pickled_with_its_place() -> None:
    error = pickle.loads(pickle.dumps(RowError("E304", "unknown role", ("messages", 2))))
    assert (error.code, str(error), error.path) == ("E304", "unknown role", ("messages", 2))


def test_lineages_do_not_name_the_machines() -> None:
    on_cluster = Config(compute=ComputeConfig(cluster="auto", workers=7))
    assert on_cluster.deciding() == Config().deciding()
    assert on_cluster.deciding().keys() == Config.model_fields.keys() - {"compute"}


@pytest.mark.slow
def test_ray_is_imported_only_for_a_cluster(tmp_path: Path) -> None:
    stand_in = tmp_path / "path" / "ray"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("raise SystemExit('Ray was imported')\n")
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in unlike_pairs(60)])
    (tmp_path / "tunewright.yaml").write_text("name: plain\n")
    environment = {**os.environ, "PYTHONPATH": f"{stand_in.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tunewright", "data", "add", "pairs.jsonl"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in unlike_pairs(60)])
    (tmp_path / "tunewright.yaml").write_text("name: plain\ncompute:\n  cluster: local\n")
    return tmp_path


def test_cluster_without_ray_is_one_error_that_names_the_extra(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = tunewright("data", "add", project / "pairs.jsonl", "-p", project)
    assert ran.code == 2
    assert "compute.cluster: Ray is not installed" in ran.stderr
    assert "pip install 'tunewright[ray,train]'" in ran.stderr
    assert not (project / "dataset").exists()


def test_unknown_kind_of_cluster_is_refused(project: Path) -> None:
    ran = tunewright("data", "add", project / "pairs.jsonl", "-p", project, "--cluster", "spark://host")
    assert ran.code == 2
    assert "--cluster: Not a cluster: 'spark://host'" in ran.stderr
    ran = tunewright("data", "check", project / "pairs.jsonl", "-p", project, "--fix", "x.jsonl", "--cluster", "auto")
    assert (ran.code, "--fix does not use --cluster" in ran.stderr) == (2, True)
    (project / "tunewright.yaml").write_text("compute: {cluster: somewhere, workers: 0}\n")
    ran = tunewright("data", "add", project / "pairs.jsonl", "-p", project)
    assert ran.code == 2
    assert "compute.cluster" in ran.stderr
    assert "compute.workers" in ran.stderr


def test_token_lengths_are_the_same_in_parts(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tunewright as package
    from tunewright.training.rows import measure_lengths

    opened = package.open(tiny_project(tmp_path / "project", tiny_base_folder, count=60))
    opened.data.add([tmp_path / "project" / "pairs.jsonl"])
    version = opened.data.version()
    whole = measure_lengths(opened.chat, "tiny", version, 20, Listener())
    monkeypatch.setattr("tunewright.training.rows._ROWS", 7)
    assert measure_lengths(opened.chat, "tiny", version, 20, Listener(), PickledWorkers()) == whole
    assert whole.too_long
    assert sum(split.rows for split in whole.splits) == 60
