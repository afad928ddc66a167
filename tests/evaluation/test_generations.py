"""Answers are computed once: journalled, found again, and kept apart by everything that decides them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from making.memory_limit import run_out_of_memory
from making.thinking_templates import build_thinking_base
from tunewright.chat import open_chat
from tunewright.config import ChatConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.evaluation import answer_worker
from tunewright.evaluation.generations import Decoding, Generator
from tunewright.generation.requests import Completion
from tunewright.models.bases import resolve_base


@pytest.fixture
def generator(tiny_base_folder: Path, tmp_path: Path) -> Generator:
    base = resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())
    return Generator(base, open_chat(base), "float32", "none", 4, tmp_path, LogReporter())


def _prompts(generator: Generator, count: int) -> list[tuple[int, ...]]:
    return [generator.chat.prompt([Message("user", "word " * n)]) for n in range(1, count + 1)]


def test_answers_come_in_the_order_of_the_prompts_and_repeated_prompts_share_one(generator: Generator) -> None:
    prompts = _prompts(generator, 6)
    forward = generator.answer("x", prompts, 8)
    backward = generator.answer("x", prompts[::-1] + prompts, 8)
    assert backward == forward[::-1] + forward
    (journal,) = generator.folder.iterdir()
    assert len([line for line in journal.read_text().split("\n") if line]) == 6


def test_answers_are_decoded_with_fewer_rows_when_memory_runs_out(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = _prompts(generator, 6)
    whole = generator.answer("x", prompts, 8)
    again = Generator(
        generator.base, generator.chat, "float32", "none", 4, generator.folder.parent / "again", LogReporter()
    )
    run_out_of_memory(again.model_with(), 1)
    assert again.answer("x", prompts, 8) == whole
    assert again.rows == 1
    assert [message for message in caplog.messages if "Memory" in message] == [
        "Memory ran out with 4 rows at once. Decoding continues with 2.",
        "Memory ran out with 2 rows at once. Decoding continues with 1.",
    ]


def test_generator_refuses_when_a_single_answer_does_not_fit(generator: Generator) -> None:
    run_out_of_memory(generator.model_with(), 0)
    with pytest.raises(UserError, match="Not enough memory to decode a single answer"):
        generator.answer("x", _prompts(generator, 2), 8)


def test_known_answers_need_no_model(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _prompts(generator, 3)
    before = generator.answer("x", prompts, 8)
    monkeypatch.setattr(answer_worker, "load_model", lambda *_: pytest.fail("the model was loaded"))
    again = Generator(generator.base, generator.chat, "float32", "none", 4, generator.folder.parent, LogReporter())
    assert again.answer("x", prompts, 8) == before


def test_journal_loses_one_answer_to_a_half_written_line(generator: Generator) -> None:
    prompts = _prompts(generator, 4)
    before = generator.answer("x", prompts, 8)
    (journal,) = generator.folder.iterdir()
    journal.write_text(journal.read_text()[:-20])
    again = Generator(generator.base, generator.chat, "float32", "none", 4, generator.folder.parent, LogReporter())
    assert again.answer("x", prompts, 8) == before
    assert again.answer("x", prompts, 8) == before


def test_journal_separates_token_limits(generator: Generator) -> None:
    (prompt,) = _prompts(generator, 1)
    (short,) = generator.answer("x", [prompt], 2)
    (long,) = generator.answer("x", [prompt], 8)
    assert short.truncated
    assert long.text.startswith(short.text[:1])
    assert len(list(generator.folder.iterdir())) == 2


def test_stop_string_ends_the_answer_and_changes_the_journal(generator: Generator) -> None:
    prompts = _prompts(generator, 6)
    whole = generator.answer("x", prompts, 12)
    stop = next(g.text for g in whole if len(g.text) > 3)[1:3]
    stopping = Generator(
        generator.base,
        generator.chat,
        "float32",
        "none",
        4,
        generator.folder.parent,
        LogReporter(),
        stop=(stop,),
    )
    cut = stopping.answer("x", prompts, 12)
    assert [g.text for g in cut] == [g.text.split(stop)[0] for g in whole]
    assert any(stop in g.text for g in whole)
    assert len(list(generator.folder.iterdir())) == 2


def test_answers_have_canonical_calls_where_the_prompt_declares_functions(generator: Generator) -> None:
    hermes = open_chat(generator.base, ChatConfig(tools="hermes"))
    calling = Generator(generator.base, hermes, "float32", "none", 4, generator.folder.parent, LogReporter())
    asked = Message("user", "x")
    functions = Message("tools", '[{"function":{"name":"f"},"type":"function"}]')
    text = '<tool_call>\n{"arguments": {"b": 2, "a": 1}, "name": "f"}\n</tool_call>'
    completion = Completion(tuple(hermes.tokenizer(text, add_special_tokens=False)["input_ids"]), "stop")
    assert calling.text(calling.prompt([functions, asked]), completion) == '{"name": "f", "arguments": {"a":1,"b":2}}'
    assert calling.text(calling.prompt([asked]), completion) == text


TEXTS = st.text(max_size=4)
DECODINGS = st.builds(
    Decoding,
    base=TEXTS,
    template=TEXTS,
    adapter=st.none() | TEXTS,
    dtype=st.sampled_from(["bfloat16", "float32"]),
    quantization=st.sampled_from(["none", "nf4"]),
    device=st.sampled_from(["cpu", "cuda"]),
    max_new_tokens=st.integers(1, 5),
    stop=st.lists(TEXTS, max_size=2).map(tuple),
    grammar=st.none() | TEXTS,
    packages=st.dictionaries(TEXTS, TEXTS, max_size=2),
    engine=TEXTS,
)


@given(DECODINGS, DECODINGS)
def test_journal_key_covers_everything_that_changes_answers(one: Decoding, other: Decoding) -> None:
    assert (one.key == other.key) == (one == other)
    for field in fields(Decoding):
        value: Any = getattr(other, field.name)
        changed = replace(one, **{field.name: value})
        assert (changed.key == one.key) == (value == getattr(one, field.name))


def test_journal_key_has_the_installed_versions(generator: Generator) -> None:
    import transformers

    packages = generator.decoding(8, None).packages
    # The index's build for CUDA is 2.11.0 as a package, and 2.11.0+cu130 as a module.
    assert packages["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert packages["transformers"] == transformers.__version__


def test_answers_have_their_thinking_counted_but_not_in_their_text(tmp_path: Path) -> None:
    base = resolve_base(str(build_thinking_base(tmp_path / "base")), None, tmp_path, LogReporter())
    chat = open_chat(base)
    generator = Generator(base, chat, "float32", "none", 4, tmp_path, LogReporter())
    asked = [Message("user", "2+2?")]
    (row,) = chat.rows([*asked, Message("assistant", "4.", reasoning="two and two")])
    ids = tuple(token for token, trained in zip(row.ids, row.loss_mask, strict=True) if trained)[:-1]
    requests = generator.requests([generator.prompt(asked)], 99)
    journal = generator._journal(99, None, constrained=False)
    with journal.keeping() as keep:
        generator._keeping(requests, keep, lambda: None)(0, Completion(ids, "stop"))
    (answer,) = generator.answer("x", [requests[0].prompt_ids], 99)
    assert (answer.text, answer.tokens, answer.truncated) == ("4.", len(ids) + 1, False)
