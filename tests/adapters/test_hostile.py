"""Every hostile adapter of the corpus is refused for its own reason, and leaves the disk unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hostile import CORPUS

from adapter_helpers import own_keys, tree, write_adapter
from command_line import tiny_project, tunewright


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    return tiny_project(tmp_path_factory.mktemp("hostile") / "project", tiny_base_folder)


@pytest.fixture(autouse=True)
def _no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


def test_hostile_corpus_is_large_and_its_base_adapter_is_imported(project: Path, tmp_path: Path) -> None:
    """The adapter that the corpus modifies is valid: without the modification it is imported."""
    assert len(CORPUS) >= 40
    ran = tunewright("adapters", "import", write_adapter(tmp_path / "good"), "--base-matches", "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["new"]


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_adapter_is_refused_for_its_reason_and_leaves_nothing(name: str, project: Path, tmp_path: Path) -> None:
    build, words = CORPUS[name]
    source = build(tmp_path)
    before = tree(project)
    ran = tunewright("adapters", "import", source, "--base-matches", "-p", project, "--json")
    assert ran.code == 2
    error = ran.document["error"]
    assert re.search(words, f"{error['where']}: {error['what']}"), error
    assert tree(project) == before
    assert not Path("/tmp/tunewright-was-here").exists()
