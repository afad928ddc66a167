"""Tokens that the model sees, through the command line: data show, data check, and adapters of another rendering."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

import tunewright as package
from making.command_line import pairs, recorded_prompts, tiny_project, trained_project, tunewright, write_jsonl
from making.tiny_bases import build_base
from tunewright.adapters.registry import find_adapter
from tunewright.serving.options import ServeOptions


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with a dataset version and a trained adapter."""
    return trained_project(tmp_path_factory.mktemp("tokens") / "project", tiny_base_folder)


def _change(project: Path, to: Path, before: str, after: str) -> Path:
    changed = Path(shutil.copytree(project, to))
    config = changed / "tunewright.yaml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    return changed


def test_tokens_finds_a_row_by_key_or_source_line(project: Path) -> None:
    pair = pairs(120)[6]
    by_line = tunewright("data", "show", "pairs.jsonl:7", "-p", project, "--json").document
    assert [m["content"] for m in by_line["messages"]] == [pair["prompt"], pair["completion"]]
    for same in (by_line["key"][:10], by_line["key"][:10].upper(), f"{project}/pairs.jsonl:7", "./pairs.jsonl:7"):
        assert tunewright("data", "show", same, "-p", project, "--json").document == by_line
    shown = tunewright("data", "show", by_line["key"][:10], "-p", project).stdout
    assert pair["prompt"] in shown
    assert f"split {by_line['split']}" in shown


def test_tokens_are_listed_with_their_mask(project: Path) -> None:
    document = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", project, "--json").document
    (row,) = document["rows"]
    assert "".join(row["texts"]) == (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>".format(**pairs(120)[6])
    )
    trained = "".join(text for text, mask in zip(row["texts"], row["loss_mask"], strict=True) if mask)
    assert trained == pairs(120)[6]["completion"] + "<|im_end|>"
    assert len(row["ids"]) == len(row["texts"]) == len(row["control"])
    shown = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", project).stdout
    assert "⟦ " + " ".join(pairs(120)[6]["completion"]) + " <|im_end|> ⟧" in shown
    assert f"{len(row['ids'])} tokens, {sum(row['loss_mask'])} trained" in shown


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("pairs.jsonl:121", "No row was read from line 121 of pairs.jsonl (last row: line 120)"),
        ("pairs.jsonl:" + "9" * 5000, "has no row"),
        ("other.jsonl:1", "Added files: pairs.jsonl"),
        ("a", "rows are named 'a'"),
    ],
)
def test_tokens_refuses_an_unknown_row(project: Path, row: str, words: str) -> None:
    ran = tunewright("data", "show", row, "-p", project)
    assert (ran.code, words in ran.stderr) == (2, True), ran.stderr


def test_tokens_shows_the_original_of_a_duplicate_and_the_fault_of_a_faulty_line(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows: list[Any] = pairs(60)
    path = write_jsonl(folder / "more.jsonl", [*rows, rows[4], {"prompt": "a"}])
    assert tunewright("data", "add", path, "-p", folder, "--skip-bad").code == 0
    first = tunewright("data", "show", "more.jsonl:5", "-p", folder, "--json").document
    assert tunewright("data", "show", "more.jsonl:61", "-p", folder, "--json").document == first
    ran = tunewright("data", "show", "more.jsonl:62", "-p", folder)
    assert (ran.code, 'missing key "completion"' in ran.stderr) == (2, True)


def test_check_counts_every_row_and_agrees_with_what_was_trained(project: Path) -> None:
    document = tunewright("data", "check", "-p", project, "--json").document
    counts = {split["split"]: split["rows"] for split in document["splits"]}
    assert sum(counts.values()) == sum(bar["rows"] for bar in document["histogram"]) == 120
    training = find_adapter(project / "adapters").lineage["training"]
    assert training["trained_tokens"] == next(s["trained"] for s in document["splits"] if s["split"] == "train")
    opened = package.open(project)
    lengths = sorted(
        len(row.ids) for m in opened.data.version().examples("train") for row in opened.chat.rows(m.example.messages)
    )
    percentiles = document["splits"][0]["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (lengths[0], lengths[-1])
    assert document["splits"][0]["tokens"] == sum(lengths)
    assert lengths[len(lengths) // 2 - 1] <= percentiles["50"] <= lengths[len(lengths) // 2]
    assert "Every row is whole" in tunewright("data", "check", "-p", project).stdout


def test_rows_over_the_limit_are_named_by_check_and_dropped_only_on_request(project: Path, tmp_path: Path) -> None:
    limited = _change(project, tmp_path / "limited", "train:\n", "train:\n  max_length: 44\n")
    ran = tunewright("data", "check", "-p", limited, "--json")
    long = ran.document["too_long"]
    assert ran.code == 2
    assert 0 < len(long) < 120
    assert all(row["tokens"] > 44 for row in long)
    assert "examples are longer than 44 tokens" in tunewright("train", "-p", limited).stderr
    dropping = _change(limited, tmp_path / "dropping", "max_length: 44\n", "max_length: 44\n  on_overlength: drop\n")
    assert tunewright("data", "check", "-p", dropping).code == 0
    ran = tunewright("train", "-p", dropping, "--json")
    in_train = {row["key"] for row in long if row["split"] == "train"}
    assert (ran.code, f"{len(in_train)} of 96 examples are longer" in ran.stderr) == (0, True)
    lineage = find_adapter(dropping / "adapters", ran.document["adapter"]).lineage
    assert {row["key"] for row in lineage["rendering"]["train"]["left_out"]} == in_train
    assert lineage["training"]["examples"] == 96 - len(in_train)


def test_check_lists_the_faults_where_no_row_is_right(project: Path, tmp_path: Path, tiny_base_folder: Path) -> None:
    base = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'] | upper"))
    shouting = _change(project, tmp_path / "shouting", f"base_model: {tiny_base_folder}", f"base_model: {base}")
    ran = tunewright("data", "check", "-p", shouting, "--json")
    assert (ran.code, len(ran.document["faults"])) == (2, 120)
    assert "Cannot be trained on: 120" in tunewright("data", "check", "-p", shouting).stdout
    shown = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", shouting, "--json")
    assert "the answer's tokens read" in shown.document["rows"][0]["fault"]
    shown = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", shouting)
    assert "training would refuse this row" in shown.stderr


def test_tokens_escapes_terminal_control_sequences(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    path = write_jsonl(folder / "pairs.jsonl", [*pairs(60), {"prompt": "\x1b[31mred\u202e\x00", "completion": "x"}])
    assert tunewright("data", "add", path, "-p", folder).code == 0
    for more in ([], ["--tokens"]):
        shown = tunewright("data", "show", "pairs.jsonl:61", *more, "-p", folder).stdout
        assert "<U+001B>" in shown.replace(" ", "")
        assert not any(c in shown for c in "\x1b\u202e\x00")


def test_evaluate_and_serve_refuse_an_adapter_trained_on_another_rendering(project: Path, tmp_path: Path) -> None:
    other = _change(project, tmp_path / "other", "train:\n", "chat:\n  template: plain\ntrain:\n")
    for command in (["evaluate"], ["serve", find_adapter(other / "adapters").name]):
        ran = tunewright(*command, "-p", other)
        assert ran.code == 2
        assert "the format was the base's own template and is the plain form" in ran.stderr


def test_evaluate_refuses_an_adapter_without_recorded_rendering(project: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    folder = find_adapter(other / "adapters").folder
    lineage = folder / "lineage.json"
    lineage.write_text(json.dumps({k: v for k, v in json.loads(lineage.read_text()).items() if k != "chat"}))
    (folder / "manifest.json").unlink()  # which such a version did not write either
    ran = tunewright("evaluate", "-p", other)
    assert (ran.code, "does not record the chat format" in ran.stderr) == (2, True)


@pytest.mark.slow
def test_train_uses_the_plain_template_for_a_base_without_one(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    folder = tiny_project(tmp_path / "project", base)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    ran = tunewright("train", "-p", folder)
    assert ran.code == 0, ran.stderr
    assert "has no chat template: using the plain form" in ran.stderr
    assert find_adapter(folder / "adapters").lineage["chat"]["kind"] == "plain"
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text() + "chat:\n  template: own\n")
    ran = tunewright("train", "-p", folder)
    assert (ran.code, "The tokenizer has no chat template" in ran.stderr) == (2, True)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "generation_config.json",
            '{"eos_token_id": [257, 999999]}',
            "has ids without a token in the tokenizer: 999999",
        ),
        ("generation_config.json", '{"eos_token_id": "257"}', "eos_token_id"),
        ("generation_config.json", "{", "The generation settings cannot be read"),
        ("tokenizer_config.json", "[]", "The tokenizer cannot be read"),
    ],
)
def test_train_reports_unreadable_files_of_a_base(tmp_path: Path, file: str, content: str, words: str) -> None:
    base = build_base(tmp_path / "base")
    (base / file).write_text(content)
    folder = tiny_project(tmp_path / "project", base)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    ran = tunewright("data", "check", "-p", folder)
    assert (ran.code, words in ran.stderr) == (2, True), ran.stderr


def test_train_refuses_a_template_with_a_syntax_error_before_computing(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}")
    folder = tiny_project(tmp_path / "project", base)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    for command in (["data", "check"], ["advise"], ["train"], ["serve"]):
        ran = tunewright(*command, "-p", folder)
        assert (ran.code, "The chat template has a syntax error" in ran.stderr) == (2, True), ran.stderr


def test_server_prompts_equal_the_training_ids(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_prompts(monkeypatch)
    opened = package.open(project)
    members = opened.data.version().examples("train")[:20]
    trained = [opened.chat.rows(m.example.messages)[0] for m in members]
    service = opened.serve(options=ServeOptions(port=0))
    with service.running() as url, httpx.Client(base_url=url, trust_env=False) as client:
        for member in members:
            messages = [{"role": m.role, "content": m.content} for m in member.example.prompt]
            body = {"model": service.models[-1], "messages": messages, "max_tokens": 1}
            assert client.post("/v1/chat/completions", content=json.dumps(body)).status_code == 200
    assert seen == [row.ids[: row.loss_mask.index(True)] for row in trained]
