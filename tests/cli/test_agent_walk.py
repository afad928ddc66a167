"""The walk of docs/tutorial/agent.md on a tiny base: rows, training, evidence, release, and the agent's own loop.

The example's rows are about a few orders here, because a tiny base learns no more in half a minute. No row has what
`find_order` finds in the agent's database, so the answers have to be read from the results.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent
import prepare_orders as orders
from making.command_line import Ran, interrupted, served, tunewright, write_jsonl
from making.tiny_bases import CHATML
from making.tool_families import family
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message

pytestmark = pytest.mark.slow

KNOWN = [(number, item, date) for number, item, _, date in agent.ORDERS]
NUMBERS = [number for number, *_ in KNOWN] + ["20461", "61158"]
ITEMS = [item for _, item, _ in KNOWN] + ["atlas"]
DATES = [date for *_, date in KNOWN] + ["30 June"]
VALUES = [*NUMBERS, *ITEMS, *DATES, "packing", "shipped", "delivered"]

# The base and its tokenizer


def _rows() -> list[dict[str, Any]]:
    """Return the example's conversations with the numbers, items and dates above; each conversation once."""
    drawn, draw = {}, random.Random(0)
    others = sorted(set(product(NUMBERS, ITEMS, DATES)) - set(KNOWN))
    for row in orders.rows(800):
        number, item, date = draw.choice(others)
        text = re.sub(r"\b\d{5}\b", number, json.dumps(row))
        text = re.sub(r"\b\d{1,2} [A-Z][a-z]+\b", date, text)
        if title := re.search(r'\\"item\\":\\"(.+?)\\"', text):
            text = text.replace(title[1], item)
        drawn[text] = json.loads(text)
    return list(drawn.values())


def _tokenizer(rows: list[dict[str, Any]]) -> Any:
    """A vocabulary of bytes, the values, the words of the questions, and each text between values in other turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chat, scores = family("hermes-chatml"), dict.fromkeys(VALUES, -1.0)
    between = re.compile("|".join(map(re.escape, VALUES)))
    for row in rows:
        turns = [Message.from_dict({**turn, "content": turn["content"] or ""}) for turn in row["messages"]]
        (text,) = chat.texts([chat.encode([Message("tools", canonical_json(row["tools"])), *turns]).ids])
        for header, content in re.findall(r"<\|im_start\|>(\w+\n)(.*?)<\|im_end\|>", text, re.DOTALL):
            words = re.findall(r" ?[A-Za-z']+", content) if header == "user\n" else between.split(content)
            scores |= dict.fromkeys([header, *filter(None, words)], -1.0)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {"".join(piece for piece, _ in level.pre_tokenize_str(text)): score for text, score in scores.items()}
    pieces = dict.fromkeys(sorted(level.alphabet()), -9.0) | pieces
    tokenizer = Tokenizer(models.Unigram([("<unk>", -99.0), *pieces.items()], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHATML
    return fast


def _write_base(folder: Path, tokenizer: Any) -> None:
    """Write random weights whose heads copy the tokens that they attend to, as heads of trained bases do.

    With the embeddings as the output layer, a head copies if its output layer is the transpose of its value layer. The
    adapter learns where to look.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# The walk

ARMS = ("arm  ", "zero-shot  ", "tuned  ")
CANCELLED = """\
> Where is order 48213?
  find_order({"order": "48213"}) -> {"date": "7 May", "item": "lighthouse calendar", "state": "packing"}
Your lighthouse calendar is being packed and leaves on 7 May.
> Cancel it, please.
  cancel_order({"order": "48213"}) -> {"cancelled": true}
Order 48213 is cancelled.
"""
REFUSED = f"""\
> Where is my order?
{orders.NEEDS_NUMBER}
> It's 90377.
  find_order({{"order": "90377"}}) -> {{"date": "2 April", "item": "field guide", "state": "shipped"}}
Your field guide was shipped on 2 April.
> Cancel it, please.
  cancel_order({{"order": "90377"}}) -> {{"cancelled": false, "reason": "shipped on 2 April"}}
Order 90377 cannot be cancelled: it was shipped on 2 April.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The example's project with its agent, on a tiny base."""
    folder = tmp_path / "orders"
    assert tunewright("init", folder, "--example", "orders").code == 0
    rows = _rows()
    write_jsonl(folder / "orders.jsonl", rows)
    _write_base(tmp_path / "base", _tokenizer(rows))
    config = yaml.safe_load((folder / "tunewright.yaml").read_text(encoding="utf-8"))
    config["base_model"] = str(tmp_path / "base")
    config["train"] |= {"lora_r": 64, "lora_alpha": 64, "learning_rate": 0.005, "epochs": 9, "batch_size": 16}
    config["train"] |= {"dtype": "float32", "eval_max_samples": 0}
    config["evaluate"]["max_new_tokens"] = 16
    (folder / "tunewright.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def _run(project: Path, *arguments: str | Path) -> Ran:
    ran = tunewright(*arguments, "-p", project)
    assert ran.code == 0, ran.stdout + ran.stderr
    return ran


def _asked(project: Path, url: str, key: str, *questions: str) -> str:
    """Run the project's own agent on the questions of one conversation; what it printed."""
    environment = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
    command = [sys.executable, "agent.py", "orders", *questions]
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_walk_from_rows_with_functions_ends_with_an_agent_that_runs_them(project: Path) -> None:
    added = _run(project, "data", "add", project / "orders.jsonl")
    assert f" {len(_rows())} examples added" in added.stdout
    trained = re.match(r"Trained: \S*adapters/(orders-[0-9a-f]{12})\n", _run(project, "train").stdout)
    assert trained

    evaluated = _run(project, "evaluate").stdout
    title, *arms = (re.split(r"  +", line) for line in evaluated.splitlines() if line.startswith(ARMS))
    shares = {arm[0]: dict(zip(title, arm, strict=True)) for arm in arms}
    for metric in ("exact match, %", "call name match, %", "valid calls, %"):
        assert (shares["zero-shot"][metric], float(shares["tuned"][metric]) >= 95) == ("0.0", True), evaluated
    assert _run(project, "verdict").stdout.startswith("Verdict: ship\n")

    deployed = _run(project, "deploy", "orders", trained[1])
    assert "Isolation test: isolated on peft" in deployed.stderr
    assert "Serving check: passed on peft" in deployed.stderr
    assert re.search(rf"^orders 1 +deploy +{trained[1]} +ship ", deployed.stdout, re.MULTILINE), deployed.stdout
    _run(project, "tenant", "add", "shop", "--alias", "orders")
    key = _run(project, "tenant", "key", "add", "shop").stdout.strip()

    with served(project) as (process, started):
        url = f"{started['url']}/v1"
        cancelled = _asked(project, url, key, "Where is order 48213?", "Cancel it, please.")
        refused = _asked(project, url, key, "Where is my order?", "It's 90377.", "Cancel it, please.")
        no_call = _asked(project, url, key, "Do you have jobs?")
        interrupted(process)
    assert cancelled == CANCELLED
    assert refused == REFUSED
    assert no_call == f"> Do you have jobs?\n{orders.ONLY_ORDERS}\n"
