"""Names of files: folders, patterns and datasets of a hub on this machine; nothing is passed over in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs

import tunewright
from making.command_line import tunewright as command
from making.dataset_hub import COMMIT, DatasetHub, serve
from tunewright.core.errors import UserError
from tunewright.data.readers.source_files import hub_files, hub_source, parse_hub_name, source_files


def _pairs(path: Path, seed: int = 0, count: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": q, "completion": a} for q, a in unlike_pairs(count, seed=seed))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_source_files_expands_a_folder_and_names_other_files(tmp_path: Path) -> None:
    wanted = [_pairs(tmp_path / "d" / name) for name in ("a.jsonl", "deep/x.json", "z.csv")]
    for name in ("README.md", ".hidden.jsonl", ".git/y.jsonl"):
        _pairs(tmp_path / "d" / name)
    listener = Listener()
    assert source_files([tmp_path / "d"], listener) == wanted
    assert listener.warned == [f"{tmp_path / 'd'}: 1 file ignored because of the suffix: README.md"]


def test_source_files_expands_a_pattern_without_duplicates(tmp_path: Path) -> None:
    files = [_pairs(tmp_path / f"p{n}.jsonl") for n in (3, 1, 2)]
    assert source_files([files[0], str(tmp_path / "p*.jsonl")], Listener()) == [files[0], files[1], files[2]]
    with pytest.raises(UserError, match="No file matches this pattern"):
        source_files([tmp_path / "q*.jsonl"], Listener())


def test_source_files_refuses_a_folder_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="The folder has no files of pairs"):
        source_files([tmp_path / "d"], Listener())


def test_source_files_treats_a_saved_dataset_as_one_source(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = tmp_path / "d" / "saved"
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(str(saved))
    other = _pairs(tmp_path / "d" / "a.jsonl")
    assert source_files([saved], Listener()) == [saved]
    assert source_files([tmp_path / "d"], Listener()) == [other, saved]


def _rows(count: int, seed: int = 0) -> bytes:
    rows = ({"prompt": q, "completion": a} for q, a in unlike_pairs(count, seed=seed))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CARD = b"""---
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/*.jsonl}
  - {split: test, path: easy_test.jsonl}
- config_name: 2023.en
  data_files: hard.csv
---
"""
DATASETS = {
    "org/plain": {"train.jsonl": _rows(24)},
    "org/splits": {"data/train-0.jsonl": _rows(12), "data/train-1.jsonl": _rows(12, 1), "data/test-0.jsonl": _rows(2)},
    "org/configs": {
        "README.md": CARD,
        "easy/b.jsonl": _rows(3),
        "easy/a.jsonl": _rows(2),
        "easy_test.jsonl": _rows(1),
        "hard.csv": b"prompt,completion\nhi,ho\n",
        "notes.txt": b"",
    },
    "org/script": {"script.py": b"raise SystemExit('run')", "train.jsonl": _rows(2)},
    "org/elsewhere": {
        "README.md": b"---\nconfigs: [{config_name: x, data_files: 'hf://datasets/org/plain/train.jsonl'}]\n---\n"
    },
    "org/empty": {"README.md": b"# Nothing"},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    import datasets
    from huggingface_hub import constants

    with serve(dict(DATASETS)) as running:
        url = f"{running.url}/datasets/org/plain/resolve/main/train.jsonl"
        card = f"---\nconfigs: [{{config_name: x, data_files: '{url}'}}]\n---\n"
        running.datasets["org/http"] = {"README.md": card.encode()}
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", running.url)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        yield running


def _names(files: list[Path]) -> list[str]:
    return [(hub_source(file) or "").partition(f"@{COMMIT}/")[2] for file in files]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("org/plain", ["train.jsonl"]),
        ("org/plain@v1", ["train.jsonl"]),
        (f"org/plain@{COMMIT}/train.jsonl", ["train.jsonl"]),
        ("org/splits:train", ["data/train-0.jsonl", "data/train-1.jsonl"]),
        ("org/splits:test", ["data/test-0.jsonl"]),
        ("org/splits/data/train-*.jsonl", ["data/train-0.jsonl", "data/train-1.jsonl"]),
        ("org/splits/*/*", ["data/test-0.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]),
        ("org/configs/easy:train", ["easy/a.jsonl", "easy/b.jsonl"]),
        ("org/configs/easy:test", ["easy_test.jsonl"]),
        ("org/configs/2023.en", ["hard.csv"]),
        ("org/configs/hard.csv", ["hard.csv"]),
    ],
)
def test_name_stands_for_its_files_at_one_commit(hub: DatasetHub, name: str, files: list[str]) -> None:
    listener = Listener()
    found = source_files([f"hf://datasets/{name}"], listener)
    assert _names(found) == files
    kept = DATASETS["/".join(name.partition("@")[0].partition(":")[0].split("/")[:2])]
    assert [file.read_bytes() for file in found] == [kept[file] for file in files]
    assert listener.said[0].endswith(f" at commit {COMMIT[:12]}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/none", ["The hub has no dataset org/none, or it is private", "hf auth login"]),
        ("org/plain@v9", ["org/plain has no revision 'v9'"]),
        ("org/splits", ["Several splits: train, test", "hf://datasets/org/splits:train"]),
        ("org/plain:dev", ["No split 'dev'", "Splits: train."]),
        ("org/configs", ["The library datasets cannot find its files: Config name is missing", "'easy', '2023.en'"]),
        ("org/configs/hard", ["BuilderConfig 'hard' not found", "'easy', '2023.en'"]),
        ("org/configs/other.csv", ["The dataset has no such file", "easy/a.jsonl"]),
        ("org/script", ["Dataset scripts are no longer supported"]),
        ("org/http", ["Data files don't belong to org/http"]),
        ("org/empty", ["The library datasets cannot find its files"]),
        ("org/elsewhere", ["Data files don't belong to org/elsewhere"]),
        ("plain", ["is not the name of a dataset on the hub", "OWNER/NAME"]),
        ("org/plain/train.jsonl:train", ["Files have no splits"]),
    ],
)
def test_name_is_refused_with_what_to_do(hub: DatasetHub, name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        hub_files(f"hf://datasets/{name}", Listener())
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value.where).startswith("hf://datasets/")


@pytest.mark.parametrize(
    "name",
    [
        "hf://datasets/org/name",
        "hf://datasets/org/name@refs/convert/parquet/default/train/0000.parquet",
        "hf://datasets/org/name@refs/pr/1/config:split",
        "hf://datasets/org/name@v1/data/*.jsonl",
    ],
)
def test_name_keeps_its_parts_as_a_path_too(name: str) -> None:
    assert str(parse_hub_name(name)) == str(parse_hub_name(Path(name))) == name
    assert parse_hub_name(name).repository == "org/name"


def test_version_records_the_commit_of_its_files(hub: DatasetHub, tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    ran = command("data", "add", "hf://datasets/org/splits@v1:train", "-p", project.root)
    assert ran.code == 0, ran.stderr
    data = tunewright.open(project.root).data
    name = f"hf://datasets/org/splits@{COMMIT}/data/train-0.jsonl"
    assert [source.name for source in data.version().manifest.sources] == [name, name.replace("-0", "-1")]
    assert data.show(f"{name}:1").example.input_text == next(iter(unlike_pairs(12)))[0]
    assert not data.add([name]).created


def test_files_are_read_from_the_cache_when_the_hub_is_unreachable(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    name = f"hf://datasets/org/plain@{COMMIT}/train.jsonl"
    here = hub_files(name, Listener())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_files(name, Listener()) == here
    for other in ("hf://datasets/org/plain", "hf://datasets/org/plain@v1/other.jsonl"):
        with pytest.raises(UserError, match="is unreachable: HF_HUB_OFFLINE is set") as caught:
            hub_files(other, Listener())
        assert caught.value.where == other


def test_command_names_an_unreachable_hub_in_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    project = new_project(tmp_path / "p")
    ran = command("data", "add", "hf://datasets/org/plain", "-p", project.root)
    assert (ran.code, ran.stderr.count("Error: hf://")) == (2, 1)
    assert "unreachable" in " ".join(ran.stderr.split())


def test_config_lists_datasets_of_the_hub(hub: DatasetHub, tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {sources: ['hf://datasets/org/none']}")
    with pytest.raises(UserError, match="The hub has no dataset org/none"):
        tunewright.open(project.root).run()
