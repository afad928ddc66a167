"""Dense retrieval: vectors of the base's hidden states and of a sentence-transformers model, and their arms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tunewright
from making.base_and_tuned import plain_base
from making.command_line import tiny_project
from making.command_line import tunewright as command
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.evaluation.verbs import open_arm_runner


def opened(folder: Path, base: Path, evaluate: str) -> Project:
    """A tiny project with its rows added, and these keys in its evaluate section."""
    tiny_project(folder, base)
    config = folder / "tunewright.yaml"
    few = f"  num_fewshot: [2]\n  static_seeds: 0\n{evaluate}"
    config.write_text(config.read_text().replace("  num_fewshot: [1, 2]\n", few), encoding="utf-8")
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project


def test_dense_vectors_are_mean_hidden_states_by_plain_transformers(tmp_path: Path, tiny_base_folder: Path) -> None:
    import torch

    project = opened(tmp_path / "project", tiny_base_folder, "  retrievers: [dense]\n")
    texts = ["red green blue 1", "a", "amber " * 40]
    found = open_arm_runner(project).embeddings.of("dense", texts)
    model = plain_base(tiny_base_folder)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([project.chat.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        assert vector == pytest.approx(states[len(states) // 3][0].mean(dim=0).numpy(), abs=1e-5)


def test_dense_vectors_are_computed_once(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = opened(tmp_path / "project", tiny_base_folder, "  retrievers: [dense]\n")
    first = open_arm_runner(project).embeddings.of("dense", ["one", "two"])
    monkeypatch.setattr("tunewright.evaluation.answer_worker.load_model", lambda *_: pytest.fail("the base is loaded"))
    assert np.array_equal(open_arm_runner(project).embeddings.of("dense", ["one", "two"]), first)


def test_inputs_beyond_the_context_are_named(
    tmp_path: Path, tiny_base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = opened(tmp_path / "project", tiny_base_folder, "  retrievers: [dense]\n")
    open_arm_runner(project).embeddings.of("dense", ["x" * 2100, "short"])
    assert "dense: 1 of 2 inputs are longer than 2,048 tokens" in caplog.text


def embedding_model(folder: Path, base: Path) -> Path:
    """Write a sentence-transformers model of a tiny base's weights into ``folder``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(base))
    SentenceTransformer(modules=[words, Pooling(64)], device="cpu").save(str(folder))
    return folder


def test_advise_screens_every_retriever_diversity_and_order(tmp_path: Path, tiny_base_folder: Path) -> None:
    embedding_model(tmp_path / "project" / "embedder", tiny_base_folder)
    keys = (
        "  retrievers: [bm25, dense, sentence-transformers]\n  embedding_model: embedder\n  mmr_lambda: [1, 0.5]\n"
        "  demonstration_order: [similar_last, similar_first]\n  max_new_tokens: 2\n"
    )
    project = opened(tmp_path / "project", tiny_base_folder, keys)
    ran = command("advise", "--no-pilot", "-p", project.folder.root, "--json")
    assert ran.code in {3, 4}, ran.stderr
    prompting = ran.document["advice"]["prompting"]
    retrieved = [arm for arm in prompting["arms"] if arm["kind"] == "retrieved"]
    assert len({(arm["retriever"], arm["mmr"], arm["order"]) for arm in retrieved}) == 3 * 2 * 2
    assert all(arm["shots"] == 2 for arm in retrieved)
    curves = {curve["name"] for curve in ran.document["advice"]["context"]["curves"]}
    assert {"retrieved by dense", "retrieved by bm25, MMR 0.5, similar first"} < curves
    # The same command again measures nothing.
    again = command("advise", "--no-pilot", "-p", project.folder.root, "--json")
    assert again.document["advice"] == ran.document["advice"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/../no model", "neither a folder nor a hub id"),
        ("empty", "cannot be loaded as a sentence-transformers"),
    ],
)
def test_unusable_embedding_model_is_one_error(tmp_path: Path, tiny_base_folder: Path, name: str, message: str) -> None:
    keys = f"  retrievers: [sentence-transformers]\n  embedding_model: {name}\n"
    project = opened(tmp_path / "project", tiny_base_folder, keys)
    (project.folder.root / "empty").mkdir()
    (project.folder.root / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message) as refused:
        project.prompting()
    assert refused.value.where == "evaluate.embedding_model"


def test_sentence_transformers_requires_an_embedding_model(tmp_path: Path, tiny_base_folder: Path) -> None:
    with pytest.raises(UserError, match="requires embedding_model"):
        opened(tmp_path / "project", tiny_base_folder, "  retrievers: [sentence-transformers]\n")
