"""What the model sees, through the command line: data show, data check, and adapters that don't fit the rendering."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tunewright as package
from command_line import pairs, tiny_project, tunewright, write_jsonl
from tiny import build_base
from tunewright.adapters.registry import find_adapter
from tunewright.models.decoding import Request
from tunewright.serving.engine import Delta, Engine


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with a dataset version and a trained adapter."""
    folder = tiny_project(tmp_path_factory.mktemp("tokens") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert tunewright("train", "-p", folder).code == 0
    return folder


def _change(project: Path, to: Path, before: str, after: str) -> Path:
    changed = Path(shutil.copytree(project, to))
    recipe = changed / "tunewright.yaml"
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after))
    return changed


def test_a_row_is_shown_by_its_key_and_by_the_line_it_came_from(project: Path) -> None:
    pair = pairs(120)[6]
    by_line = tunewright("data", "show", "pairs.jsonl:7", "-p", project, "--json").document
    assert [m["content"] for m in by_line["messages"]] == [pair["prompt"], pair["completion"]]
    assert tunewright("data", "show", by_line["key"][:10], "-p", project, "--json").document == by_line
    shown = tunewright("data", "show", by_line["key"][:10], "-p", project).stderr
    assert pair["prompt"] in shown
    assert f"split {by_line['split']}" in shown


def test_tokens_are_shown_one_by_one_with_those_that_are_trained(project: Path) -> None:
    document = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", project, "--json").document
    (row,) = document["rows"]
    assert "".join(row["texts"]) == (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>".format(**pairs(120)[6])
    )
    trained = "".join(text for text, mask in zip(row["texts"], row["loss_mask"], strict=True) if mask)
    assert trained == pairs(120)[6]["completion"] + "<|im_end|>"
    assert len(row["ids"]) == len(row["texts"]) == len(row["control"])
    shown = tunewright("data", "show", "pairs.jsonl:7", "--tokens", "-p", project).stderr
    assert "⟦ " + " ".join(pairs(120)[6]["completion"]) + " <|im_end|> ⟧" in shown
    assert f"{len(row['ids'])} tokens, {sum(row['loss_mask'])} trained" in shown


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("pairs.jsonl:121", "no row came from pairs.jsonl:121"),
        ("other.jsonl:1", "Added files: pairs.jsonl"),
        ("zzz", "has no row 'zzz'"),
        ("", "has no row"),
        ("1", "rows begin with '1'"),
    ],
)
def test_a_row_that_is_not_there_is_told(project: Path, row: str, words: str) -> None:
    ran = tunewright("data", "show", row, "-p", project)
    assert (ran.code, words in ran.stderr) == (2, True), ran.stderr


def test_a_duplicate_s_line_shows_the_row_it_repeats_and_a_faulty_one_its_fault(
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
    road = package.open(project)
    lengths = sorted(
        len(row.ids) for m in road.version().examples("train") for row in road.chat.rows(m.example.messages)
    )
    percentiles = document["splits"][0]["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (lengths[0], lengths[-1])
    assert lengths[len(lengths) // 2 - 1] <= percentiles["50"] <= lengths[len(lengths) // 2]
    assert "Every row is whole" in tunewright("data", "check", "-p", project).stderr


def test_rows_over_the_limit_are_named_by_check_and_dropped_only_on_request(project: Path, tmp_path: Path) -> None:
    limited = _change(project, tmp_path / "limited", "train:\n", "train:\n  max_length: 44\n")
    ran = tunewright("data", "check", "-p", limited, "--json")
    long = ran.document["too_long"]
    assert ran.code == 2
    assert 0 < len(long) < 120
    assert all(row["tokens"] > 44 for row in long)
    assert "cannot be trained on whole" in tunewright("train", "-p", limited).stderr
    dropping = _change(limited, tmp_path / "dropping", "max_length: 44\n", "max_length: 44\n  too_long: drop\n")
    assert tunewright("data", "check", "-p", dropping).code == 0
    ran = tunewright("train", "-p", dropping, "--json")
    in_train = {row["key"] for row in long if row["split"] == "train"}
    assert (ran.code, f"{len(in_train)} of 96 examples are longer" in ran.stderr) == (0, True)
    lineage = find_adapter(dropping / "adapters", ran.document["adapter"]).lineage
    assert {row["key"] for row in lineage["rendering"]["train"]["left_out"]} == in_train
    assert lineage["training"]["examples"] == 96 - len(in_train)


def test_look_alikes_are_counted_and_trained_as_text(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [{**row, "prompt": row["prompt"] + " <|im_end|>"} for row in pairs(30)] + pairs(60, seed=1)
    path = write_jsonl(folder / "pairs.jsonl", rows)
    assert tunewright("data", "add", path, "-p", folder).code == 0
    ran = tunewright("data", "check", "-p", folder)
    assert (ran.code, "30 rows have text that looks like a control token" in ran.stderr) == (0, True)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ("template: plain", "they had the base's own template and now have the plain form"),
        ("date: 2025-01-01", None),
    ],
)
def test_an_adapter_that_was_trained_on_another_rendering_is_refused(
    project: Path, tmp_path: Path, chat: str, words: str | None
) -> None:
    """The tiny base's template writes no date, so another date is no other rendering."""
    other = _change(project, tmp_path / "other", "train:\n", f"chat:\n  {chat}\ntrain:\n")
    ran = tunewright("evaluate", "-p", other)
    if words is None:
        assert ran.code in {0, 3, 4}
        return
    assert (ran.code, words in ran.stderr) == (2, True), ran.stderr
    served = tunewright("serve", find_adapter(other / "adapters").name, "-p", other)
    assert (served.code, words in served.stderr) == (2, True), served.stderr


def test_an_adapter_whose_base_has_another_template_now_is_refused_with_the_line(
    project: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    base = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>\n\n"))
    other = _change(project, tmp_path / "other", f"base: {tiny_base_folder}", f"base: {base}")
    ran = tunewright("evaluate", "-p", other)
    assert ran.code == 2
    assert "other chat_template.jinja; the chat template differs from its line" in ran.stderr


def test_an_adapter_of_a_version_that_did_not_record_its_rendering_is_refused(project: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    lineage = find_adapter(other / "adapters").folder / "lineage.json"
    lineage.write_text(json.dumps({k: v for k, v in json.loads(lineage.read_text()).items() if k != "chat"}))
    ran = tunewright("evaluate", "-p", other)
    assert (ran.code, "does not say how its conversations were written" in ran.stderr) == (2, True)


def test_a_base_without_a_template_goes_the_whole_road_in_the_plain_form(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    folder = tiny_project(tmp_path / "project", base)
    ran = tunewright("run", "-p", folder)
    assert ran.code in {0, 3, 4}, ran.stderr
    assert "has no chat template: conversations are written in the plain form" in ran.stderr
    assert find_adapter(folder / "adapters").lineage["chat"]["kind"] == "plain"
    recipe = folder / "tunewright.yaml"
    recipe.write_text(recipe.read_text() + "chat:\n  template: own\n")
    ran = tunewright("train", "-p", folder)
    assert (ran.code, "the tokenizer has no chat template" in ran.stderr) == (2, True)


def test_a_template_with_a_syntax_error_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}")
    folder = tiny_project(tmp_path / "project", base)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    for command in (["data", "check"], ["advise"], ["train"], ["serve"]):
        ran = tunewright(*command, "-p", folder)
        assert (ran.code, "the chat template has a syntax error" in ran.stderr) == (2, True), ran.stderr


def test_the_server_prompts_with_exactly_the_ids_that_training_saw(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    stream = Engine.stream

    def recording(self: Engine, request: Request) -> AsyncGenerator[Delta, None]:
        seen.append(tuple(request.prompt_ids))
        return stream(self, request)

    monkeypatch.setattr(Engine, "stream", recording)
    road = package.open(project)
    members = road.version().examples("train")[:20]
    trained = [road.chat.rows(m.example.messages)[0] for m in members]
    service = road.serve(port=0)
    with service.running() as url, httpx.Client(base_url=url, trust_env=False) as client:
        for member in members:
            messages = [{"role": m.role, "content": m.content} for m in member.example.prompt]
            body = {"model": service.models[-1], "messages": messages, "max_tokens": 1}
            assert client.post("/v1/chat/completions", content=json.dumps(body)).status_code == 200
    assert seen == [row.ids[: row.loss_mask.index(True)] for row in trained]
