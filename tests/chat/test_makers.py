"""Bases with the model makers' tokenizers: how they are loaded, and the whole pipeline on them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunewright
from making import makers
from making.command_line import COLOURS, recorded_prompts, write_jsonl
from making.command_line import tunewright as run
from tunewright.chat import encode, open_chat
from tunewright.config import ChatConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.models.bases import Base, resolve_base
from tunewright.models.loading import load_tokenizer
from tunewright.serving.options import ServeOptions

Messages = list[dict[str, str]]

ORDINARY = [
    "What is the holding?",
    "The holding: reversed.\n\n1. Error of law.\n2. No jury.\n\ttab, and  two spaces",
    "Größenwahn, naïve façade – «où est l'élève ?»",
    "Привет, мир! Γειά σου κόσμε. שלום עולם مرحبا بالعالم",
    "東京は日本の首都です。人口は1400万人。 서울은 한국의 수도입니다.",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "👩‍👩‍👧 🎉🎉 naïve 🏳️‍🌈 e\u0301",
    "def f(x: int) -> str:\n    return f'{x!r}'  # 3.14159, 0x1F, 12345678\n",
    " leading and trailing  ",
]


def _conversation(texts: list[str], system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text alone, whatever special tokens it spells."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


HINDI = "नमस्ते दुनिया"
"""Its vowels are marks, which Llama 3's rule cuts off their letters and Mistral's does not."""


def _tekken_base(folder: Path, **files: str) -> Base:
    """A tiny Mistral with Mistral's own tokenizer file, as its repositories hold it, and other files next to it."""
    makers.build_mistral_base(folder, "v13")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    shutil.copyfile(makers.written_tekken("v13"), folder / "tekken.json")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return resolve_base(str(folder), None, folder.parent, LogReporter())


def test_tekken_json_alone_requires_chat_template_setting(tmp_path: Path) -> None:
    base = _tekken_base(tmp_path / "base")
    with pytest.raises(UserError, match="unknown whether the model is instruction-tuned") as caught:
        open_chat(base)
    assert "chat.template to own" in (caught.value.fix or "")
    own = open_chat(base, ChatConfig(template="own"))
    messages = _conversation(ORDINARY[:3], "Cite.")
    asked = [Message("user" if m["role"] == "user" else "system", m["content"]) for m in messages[:2]]
    assert list(own.prompt(asked)) == makers.mistral_reference("v13", messages[:2])
    assert open_chat(base, ChatConfig(template="plain")).template.kind == "plain"


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_template_next_to_tekken_json_is_used(name: str, tmp_path: Path) -> None:
    template = (makers.TEMPLATES / "mistral_v7_tekken.jinja").read_text(encoding="utf-8")
    text = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    base = _tekken_base(tmp_path / "base", **{name.replace(".", "__"): text})
    assert open_chat(base).template.source == template
    assert name in base.files
    assert "tekken.json" in base.files


def test_tekken_json_overrides_a_tokenizer_json_with_another_rule(tmp_path: Path) -> None:
    """Mistral published tokenizer.json files whose rule cuts text otherwise than its own encoder."""
    folder = makers.build_mistral_base(tmp_path / "base", "v13")
    wrong = _with_llama3_rule(folder)
    assert _encode(load_tokenizer(wrong), HINDI) != makers.mistral_encoder("v13").encode(HINDI, bos=False, eos=False)
    shutil.copyfile(makers.written_tekken("v13"), folder / "tekken.json")
    assert _encode(load_tokenizer(wrong), HINDI) == makers.mistral_encoder("v13").encode(HINDI, bos=False, eos=False)


@pytest.mark.slow
def test_tokenizer_json_with_a_wrong_rule_is_corrected(tmp_path: Path) -> None:
    # transformers knows the files that it corrects by their 100,000 tokens and more.
    folder = makers.build_mistral_base(tmp_path / "base", "v7-tekken")
    base = _with_llama3_rule(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.50.0"}))
    assert _encode(load_tokenizer(base), HINDI) == makers.mistral_encoder("v7-tekken").encode(
        HINDI, bos=False, eos=False
    )


def _with_llama3_rule(folder: Path) -> Base:
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = makers.llama3_encoder().pat_str
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    return Base("base", folder, None, "MistralForCausalLM", {})


PIPELINE_BASES = {
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
@pytest.mark.parametrize("maker", PIPELINE_BASES)
def test_served_dialogue_has_the_ids_of_training(maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = PIPELINE_BASES[maker](tmp_path / "base")
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
