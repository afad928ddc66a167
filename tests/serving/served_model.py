"""A tiny base with three adapters behind an engine, for the tests of serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat.answers import grammar_compiler
from tunewright.config import GatewayConfig
from tunewright.data.examples import Message
from tunewright.engines.peft import PeftEngine
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving

TOKENIZER = byte_tokenizer()
CHAT = chat_of(TOKENIZER)
STOPS = frozenset({TOKENIZER.eos_token_id})
MODELS = {"base": None, "courts": "one", "recipes": "two", "tickets": "three"}
"""Adapters by the names that clients ask for; here they are called otherwise than by digests."""
GRAMMARS = grammar_compiler(CHAT)
# Far more than a test waits for: what has this much room and still ends was taken out.
CONTEXT = 100_000
NOT_A_TOKEN = 1_000_000
LIMITS = GatewayConfig()


def render(messages: Sequence[Message]) -> tuple[int, ...]:
    """The chat template's ids; a message "POISON" adds one that the model has no embedding for."""
    ids = CHAT.prompt(messages)
    return (*ids, NOT_A_TOKEN) if messages[-1].content == "POISON" else ids


def decode(ids: Sequence[int]) -> str:
    """Text without special tokens."""
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


def build_base() -> Any:
    """Random weights that prefer printable ASCII and now and then stop."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **shape))
    printable = {TOKENIZER.convert_tokens_to_ids(chr(code)) for code in range(33, 127)}
    unlikely = sorted(set(range(len(TOKENIZER))) - printable - STOPS)
    with torch.no_grad():
        model.lm_head.weight[unlikely] = 0
    return model.eval()


def build_model() -> Any:
    """The base with adapters that change the answers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped: Any = get_peft_model(build_base(), config, "one")
    for name in ("two", "three"):
        wrapped.add_adapter(name, config)
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    for lora in wrapped.peft_config.values():
        # peft keeps targets as a set. Sorted, adapters have the same digests in each process, and so a canary the same
        # conversations.
        lora.target_modules = sorted(lora.target_modules)
    return wrapped.eval()


def expected_answer(model: Any, adapter: str | None, content: str, max_tokens: int) -> str:
    """Return the decoding loop's own answer."""
    request = Request(render([Message("user", content)]), adapter, max_tokens)
    (answer,) = generate(model, [request], stop_ids=STOPS, pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


@contextmanager
def running_engine(model: Any, max_num_seqs: int = 8, stop_ids: frozenset[int] = STOPS) -> Iterator[PeftEngine]:
    """An engine that is stopped at the end; without ``stop_ids`` an answer ends at its limit only."""
    engine = PeftEngine(
        model, stop_ids=stop_ids, pad_id=TOKENIZER.pad_token_id, max_num_seqs=max_num_seqs, context_length=CONTEXT
    )
    try:
        yield engine
    finally:
        engine.stop()


def texts(stops: Sequence[str] = ()) -> Tokenization:
    """Between text and ids, as a server has it."""
    return Tokenization(render, CHAT.continuation, decode, GRAMMARS, tuple(stops), CHAT)


@contextmanager
def running_server(
    model: Any,
    max_num_seqs: int = 8,
    stop_ids: frozenset[int] = STOPS,
    stops: Sequence[str] = (),
    limits: GatewayConfig = LIMITS,
) -> Iterator[str]:
    """The address of a server over the model, with stop strings of its own."""
    with (
        running_engine(model, max_num_seqs, stop_ids) as engine,
        serving(Gateway(engine, AnonymousAuth(MODELS), texts(stops), limits).app) as url,
    ):
        yield url


@contextmanager
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of a server, past the machine's proxies."""
    with (
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client
