"""A base whose answers depend on its instruction, and a reflection model that follows a script.

The base is a Llama with weights set by hand. It answers ``y`` if the prompt has more of the letter Q than of Z, else
``n``. The rows want ``n`` where the question has a Z. So an instruction with exactly one Q is right on all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from making.command_line import COLOURS, write_jsonl
from making.tiny_bases import byte_tokenizer, tiny_model
from tunewright.serving.gateway.server import serving

OWN = "Answer."
TWO = "Answer with QQ."
ONE = "Answer with Q."


def counting_base(folder: Path) -> Path:
    """Write the base into ``folder``."""
    import torch

    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, tie_word_embeddings=False, **ids)

    def token(text: str) -> int:
        return int(tokenizer(text)["input_ids"][0])

    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if "norm" in name else 0.0)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        for table, scale in ((embedding, 0.1), (head, 0.01)):  # no row of zeros, which an untrained token has
            table[:, 8:].normal_(std=scale, generator=torch.Generator().manual_seed(0))
        embedding[:, 3] = 1.0
        embedding[token("Q"), 0], embedding[token("Z"), 0] = 1.0, -1.0
        embedding[[token("y"), token("n")], 1] = 1.0
        # Attention is uniform, since queries are 0: its output is the mean of the letters' signs.
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, 0] = 1.0
        attention.o_proj.weight[2, 0] = 1.0
        head[tokenizer.eos_token_id, 1] = 1e6  # the answer is one letter
        head[token("y"), 2] = 1e4
        head[token("n"), 3] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of unlike questions, two fifths of them with a Z."""
    generator = random.Random(seed)
    made = []
    for n in range(count):
        with_z = n % 5 < 2
        question = " ".join(generator.sample(COLOURS, 3)) + f" {n * 7919 % 10007}{' Z' if with_z else ''}"
        turns = [("system", OWN), ("user", question), ("assistant", "n" if with_z else "y")]
        made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return made


def counting_project(folder: Path, base: Path, url: str | None, **optimization: Any) -> Path:
    """A project on the base; ``optimization`` are keys of the section, and those of the reflection model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", rows(150))
    model = {
        key: optimization.pop(key) for key in ("price_input", "price_output", "parameters") if key in optimization
    } | {"base_url": url, "model": "scripted", "max_retries": 0}
    section = {"val_items": 20, "max_metric_calls": 120, **optimization}
    config = {
        "name": "counting",
        "base_model": str(base),
        "data": {"sources": ["pairs.jsonl"], "val_size": 0.2, "test_size": 0.1},
        "train": {"dtype": "float32", "epochs": 1, "batch_size": 32},
        "evaluate": {
            "num_fewshot": [1],
            "static_seeds": 0,
            "retrievers": ["bm25"],
            "max_new_tokens": 4,
            "prompt_optimization": section if url is None else {**section, "reflection_model": model},
        },
        "regressions": {"samples": 0},
    }
    (folder / "tunewright.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def improving(prompt: str) -> str:
    """The next instruction, by the one that it is asked to improve: first one Q too many, then the right number."""
    current = prompt.split("```")[1].strip()
    return {OWN: TWO, TWO: ONE}.get(current, "Say it again.")


@dataclass
class Reflection:
    """Requests to the reflection model, and its script."""

    script: Callable[[str], str]
    url: str = ""
    prompts: list[str] = field(default_factory=list)
    misbehave: Callable[[int], Response | None] = lambda _count: None
    """Called with the number of earlier requests; a response in place of the script's."""
    finish: str = "stop"


@contextmanager
def reflecting(script: Callable[[str], str] = improving) -> Iterator[Reflection]:
    """Serve a script at ``url``, as an OpenAI-compatible API on loopback, while the block runs."""
    server = Reflection(script)

    async def chat(http: Request) -> Response:
        prompt = json.loads(await http.body())["messages"][-1]["content"]
        other = server.misbehave(len(server.prompts))
        server.prompts.append(prompt)
        if other is not None:
            return other
        message = {"role": "assistant", "content": f"I looked at the answers.\n```\n{server.script(prompt)}\n```"}
        choice = {"index": 0, "message": message, "finish_reason": server.finish}
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}})

    with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        server.url = f"{url}/v1"
        yield server
