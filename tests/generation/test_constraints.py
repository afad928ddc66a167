"""Constrained answers, checked against re, jsonschema and membership; matching answers stay unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import makers
from making.property_examples import examples
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat.answers import grammar_compiler
from tunewright.config import ConstrainConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.generation.constraints import Constraint, Grammar, GrammarCompiler
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion, Request

TOKENIZER = byte_tokenizer()
STOP_IDS = frozenset([TOKENIZER.eos_token_id])
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "court": {"enum": ["Ala.", "Ga.", "Fla."]},
        "number": {"type": "integer", "minimum": 0, "maximum": 999},
        "appeal": {"type": "boolean"},
    },
    "required": ["court", "number"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Return random weights that end an answer now and then, with a few more logits than tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model_config = LlamaConfig(vocab_size=len(TOKENIZER) + 5, num_attention_heads=4, initializer_range=0.3, **shape)
    return LlamaForCausalLM(model_config).eval()


def _constraint(**how: Any) -> Constraint:
    return GrammarCompiler(TOKENIZER, STOP_IDS).compile(Grammar.from_config(ConstrainConfig(**how), Path()))


def _requests(texts: Sequence[str], constraint: Constraint | None, limit: int = 60, **how: Any) -> list[Request]:
    ids = [tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [Request(prompt, None, limit, constraint=constraint, **how) for prompt in ids]


def _answers(model: Any, requests: list[Request]) -> list[Completion]:
    return generate(model, requests, stop_ids=STOP_IDS, pad_id=TOKENIZER.pad_token_id, batch_size=3)


def _text(completion: Completion) -> str:
    return str(TOKENIZER.decode(completion.ids))


def _is_json_of_schema(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


CHOICES = ("Ala. Cir. Ct.", "Ala. Cir.", 'Ga.\n"Super\\', "é – Fla.")
PATTERN = r"[A-Z][a-z]{1,3}\. (Cir|Dist)/\d{1,3}(, [A-Z][a-zé ]{0,5})?"
KINDS: list[tuple[Constraint, Callable[[str], bool]]] = [
    (_constraint(choices=CHOICES), lambda text: text in CHOICES),
    (_constraint(regex=PATTERN), lambda text: re.fullmatch(PATTERN, text) is not None),
    (_constraint(json_schema=SCHEMA), _is_json_of_schema),
]
PROMPTS = st.lists(st.text("abcXYZ 0,{", min_size=1, max_size=8), min_size=1, max_size=5)


@pytest.mark.parametrize(("constraint", "right"), KINDS, ids=["choices", "regex", "json"])
@given(PROMPTS, st.sampled_from([0.0, 1.5]))
@examples(12)
def test_constrained_answers_match_unless_cut_at_the_limit(
    model: Any, constraint: Constraint, right: Callable[[str], bool], prompts: list[str], temperature: float
) -> None:
    for completion in _answers(model, _requests(prompts, constraint, temperature=temperature, seed=1)):
        text = _text(completion)
        assert completion.finish == "length" or right(text)
        assert completion.finish == "length" or constraint.matches(text)


def test_unconstrained_answers_mostly_do_not_match(model: Any) -> None:
    free = _answers(model, _requests(["abc", "X", "0,{"], None))
    assert not any(right(_text(completion)) for completion in free for _, right in KINDS)


@given(PROMPTS)
@examples(15)
def test_constraint_leaves_a_matching_answer_unchanged(model: Any, prompts: list[str]) -> None:
    free = _answers(model, _requests(prompts, None, limit=30))
    whole = [completion for completion in free if completion.finish == "stop" and completion.ids]
    texts = sorted({_text(completion) for completion in whole} | {"another"})
    # The grammar reads text: skip answers with bytes that are not text.
    loose = _constraint(regex=r"(?s).*")
    held = _answers(model, _requests(prompts, loose, limit=30))
    readable = ["\ufffd" not in _text(completion) for completion in free]
    assert [c for c, r in zip(held, readable, strict=True) if r] == [
        c for c, r in zip(free, readable, strict=True) if r
    ]
    named = [text for text in texts if "\ufffd" not in text]
    held = _answers(model, _requests(prompts, _constraint(choices=named), limit=30))
    for completion, before in zip(held, free, strict=True):
        if before.finish == "stop" and _text(before) in named:
            assert completion == before


def test_free_and_constrained_rows_share_a_batch(model: Any) -> None:
    texts = ["abc", "X", "0,{", "bb"]
    free = _answers(model, _requests(texts, None, limit=20))
    held = _answers(model, _requests(texts, KINDS[0][0], limit=20))
    mixed = [*_requests(texts, None, limit=20), *_requests(texts, KINDS[0][0], limit=20)]
    assert _answers(model, mixed) == [*free, *held]


@given(st.text(max_size=12), st.sampled_from(range(3)))
@examples(60)
def test_constraint_matches_exactly_when_an_independent_check_does(text: str, kind: int) -> None:
    constraint, right = KINDS[kind]
    assert constraint.matches(text) == right(text.strip())


@pytest.mark.parametrize("name", ["bytes", "mistral-v3", "llama2"])
def test_constraint_allows_answers_in_the_chat_format(name: str) -> None:
    """SentencePiece's first token has a space before the word; Llama 2's form writes a space after the answer, too."""
    makes: dict[str, Callable[[], Any]] = {
        "mistral-v3": lambda: makers.mistral_tokenizer("v3"),
        "llama2": makers.llama2_tokenizer,
        "bytes": byte_tokenizer,
    }
    chat = chat_of(makes[name]())
    constraint = grammar_compiler(chat).compile(Grammar.choices(("Yes indeed", "No")))
    written = chat.encode([Message("user", "Is it?"), Message("assistant", "Yes indeed")])
    answer = [token for token, trained in zip(written.ids, written.loss_mask, strict=True) if trained]
    guide = constraint.start()
    for token in answer:
        allowed = np.unpackbits(np.frombuffer(guide.allowed(), dtype=np.uint8), bitorder="little")
        assert allowed[token]
        if token not in chat.stop_ids:
            guide.advance(token)
    assert constraint.matches(chat.text(answer))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"json_schema": {"type": "object", "not": {}}}, "not"),
    ],
)
def test_constraint_refuses_grammars_that_the_engine_rejects(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)evaluate\.structured_outputs: .*{message}"):
        _constraint(**how)


def test_grammar_reads_a_schema_file_and_reports_its_faults(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(json.dumps(SCHEMA))
    config = ConstrainConfig(json_schema="answer.json")
    assert Grammar.from_config(config, tmp_path) == Grammar.from_config(ConstrainConfig(json_schema=SCHEMA), tmp_path)
    (tmp_path / "answer.json").write_text("{")
    with pytest.raises(UserError, match=r"answer\.json: Not valid JSON"):
        Grammar.from_config(config, tmp_path)
    with pytest.raises(UserError, match=r"other\.json: No such JSON schema"):
        Grammar.from_config(ConstrainConfig(json_schema="other.json"), tmp_path)


def test_guide_fails_when_its_grammar_becomes_too_complex_and_never_ends_the_answer() -> None:
    guide = GrammarCompiler(TOKENIZER, STOP_IDS).compile(Grammar.regex("((a{1,100}){1,100}){1,100}")).start()
    letter = TOKENIZER.convert_tokens_to_ids("a")

    def decode() -> None:
        for _ in range(3000):
            allowed = np.unpackbits(np.frombuffer(guide.allowed(), dtype=np.uint8), bitorder="little")
            assert allowed[letter], "a fault is no reason to end"
            guide.advance(letter)

    with pytest.raises(UserError, match=r"too many expressions constructed$"):
        decode()
