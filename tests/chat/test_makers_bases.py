"""Bases with the makers' tokenizers through the pipeline: training, serving and refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import makers
import tunewright
from command_line import COLOURS, recorded_prompts, write_jsonl
from command_line import tunewright as run
from tunewright.chat import encode
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.serving.options import ServeOptions

BASES = {
    "llama3_2": partial(makers.build_llama3_base, family="llama3_2"),
    "mistral-v3": partial(makers.build_mistral_base, version="v3"),
}


def _dialogue(number: int) -> list[dict[str, Any]]:
    first, second = COLOURS[number % 10], COLOURS[(number // 10) % 10]
    return [
        {"role": "system", "content": "Repeat the colour."},
        {"role": "user", "content": f" {first} [INST] {number * 7919 % 10007}\n"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": f"{second} <|eot_id|></s> and {number * 104729 % 10007}"},
        {"role": "assistant", "content": second},
    ]


def _project(folder: Path, base: Path) -> Path:
    folder.mkdir()
    write_jsonl(folder / "pairs.jsonl", [{"messages": _dialogue(n)} for n in range(40)])
    (folder / "tunewright.yaml").write_text(
        f"name: made\nbase_model: {base}\nchat:\n  date: 2026-02-28\ntrain:\n  epochs: 1\n  dtype: float32\n"
    )
    assert run("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("maker", BASES)
def test_served_dialogue_has_the_ids_of_training(maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES[maker](tmp_path / "base")
    folder = _project(tmp_path / "project", base)
    assert run("train", "--force", "-p", folder).code == 0
    seen = recorded_prompts(monkeypatch)
    project = tunewright.open(folder)
    member = project.data.version().examples("train")[0]
    messages = [m.as_dict() for m in member.example.messages]
    service = project.serve(options=ServeOptions(port=0))
    with service.running() as url, httpx.Client(base_url=url, trust_env=False) as client:
        for asked in (messages[:2], messages[:4]):
            body = {"model": service.models[-1], "messages": asked, "max_tokens": 1}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    rows = project.chat.rows(member.example.messages)
    starts = [
        row.ids[:place]
        for row in rows
        for place, trained in enumerate(row.loss_mask)
        if trained and not row.loss_mask[place - 1]
    ]
    assert seen == starts
    # Mistral v3 moves the system text, so that each answer is a row of its own.
    assert len(rows) == (2 if maker == "mistral-v3" else 1)


def test_encode_accepts_a_base(tmp_path: Path) -> None:
    base = resolve_base(str(makers.build_mistral_base(tmp_path, "v7")), None, tmp_path, LogReporter())
    messages = _dialogue(3)
    assert list(encode(base, messages).ids) == makers.mistral_reference("v7", messages)


@pytest.mark.slow
def test_llama3_template_on_its_base_model_is_refused_but_not_the_plain_form(tmp_path: Path) -> None:
    """Llama 3's base models were never trained on the tokens that chat templates are made of."""
    base = makers.build_llama3_base(tmp_path / "base", "llama3")
    weights = load_file(base / "model.safetensors")
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    untrained = makers.llama3_tokenizer().convert_tokens_to_ids(names)
    weights["model.embed_tokens.weight"][untrained] = torch.zeros(1)
    save_file(weights, base / "model.safetensors")
    # The base model's tokenizer ends a text with <|end_of_text|>.
    model_config = base / "tokenizer_config.json"
    model_config.write_text(
        model_config.read_text().replace('"eos_token": "<|eot_id|>"', '"eos_token": "<|end_of_text|>"')
    )
    folder = _project(tmp_path / "project", base)
    for command in (["data", "check"], ["train", "--force"]):
        ran = run(*command, "-p", folder)
        assert ran.code == 2
        assert all(name in ran.stderr for name in names), ran.stderr
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("chat:\n", "chat:\n  template: plain\n"))
    ran = run("data", "check", "-p", folder)
    assert ran.code == 0, ran.stderr
    shown = run("data", "show", "pairs.jsonl:1", "--tokens", "-p", folder, "--json").document["rows"][0]
    control = [text for text, special in zip(shown["texts"], shown["control"], strict=True) if special]
    assert control == ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"]
