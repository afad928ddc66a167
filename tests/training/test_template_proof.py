"""The proof of chat templates: published ones pass, and each mutation fails the part that it breaks."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from making import makers
from making.thinking_templates import template_chat, thinking_chat
from making.tiny_bases import CHATML
from tunewright.core.errors import UserError
from tunewright.training.template_proof import TemplateFinding, prove_template

QWEN3 = makers.trl_template("qwen3")
WITHOUT_ANSWERS = CHATML.replace(
    "{{ '<|im_start|>' +", "{{ '' if message['role'] == 'assistant' and not loop.last else '<|im_start|>' +", 1
)
FORGETFUL = CHATML.replace("in messages", "in messages[-3:]")


def _proof(source: str, *ends: str) -> dict[str, TemplateFinding]:
    return {finding.part: finding for finding in prove_template(partial(template_chat, source, *ends))}


PUBLISHED = {
    "qwen2_5": (["<|im_end|>"], {"functions": "passed", "thinking": "absent"}),
    "qwen3": (["<|im_end|>"], {"functions": "passed", "thinking": "passed"}),
    "qwen3_5_think": (["<|im_end|>"], {"functions": "absent", "thinking": "passed"}),
    "gemma": (["<end_of_turn>"], {"system": "absent", "functions": "absent", "thinking": "absent"}),
    "gemma3": (["<end_of_turn>"], {"functions": "absent", "thinking": "absent"}),
    "gemma4_v5": (["<turn|>"], {"functions": "absent", "thinking": "passed"}),
    "gptoss": (["<|return|>", "<|call|>"], {"functions": "absent", "thinking": "passed", "date": "passed"}),
    "llama3_1": (["<|eot_id|>"], {"functions": "passed", "thinking": "absent", "date": "passed"}),
    "llama3_2": (["<|eot_id|>"], {"functions": "passed", "thinking": "absent", "date": "passed"}),
    "phi3": (["<|end|>"], {"functions": "absent", "thinking": "absent"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_template_passes(name: str) -> None:
    ends, expected = PUBLISHED[name]
    proof = _proof(makers.trl_template(name), *ends)
    assert [f for f in proof.values() if f.state == "failed"] == []
    assert {part: proof[part].state for part in expected} == expected
    assert all(end in proof["end tokens"].found for end in ends)
    assert proof["date"].state == expected.get("date", "absent")


def test_page_names_the_published_templates_that_are_proved() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "models.md").read_text(encoding="utf-8")
    named = {name for cell in re.findall(r"\| trl: (.+) \|\n", page) for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PUBLISHED)


def test_magistral_passes_and_keeps_earlier_thinking() -> None:
    proof = {finding.part: finding for finding in prove_template(partial(thinking_chat, "magistral"))}
    assert {finding.state for part, finding in proof.items() if part != "date"} == {"passed"}
    assert "earlier turns is kept" in proof["thinking"].found


@pytest.mark.parametrize(
    ("source", "part", "words"),
    [
        (FORGETFUL, "turns", "Cannot locate the answer"),
        (WITHOUT_ANSWERS, "turns", "the prompt has the assistant turn 'D. Mass."),
        (
            CHATML.replace("in messages", "in messages if message['role'] != 'system'"),
            "system",
            "don't spell the system",
        ),
        (CHATML.replace("message['content']", "message['content'] | upper"), "answers", "the answer's tokens read"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n'"), "answers", "does not end answers with an end token"),
        (CHATML.replace("message['content']", "message['content'] * 2"), "answers", "the answer's tokens read"),
        (
            makers.trl_template("qwen3").replace(
                "reasoning_content.strip('\\n')", "reasoning_content | replace('f', '')"
            ),
            "thinking",
            "the thinking's tokens read",
        ),
        (
            QWEN3.replace("loop.index0 > ns.last_query_index", "false"),
            "thinking",
            "need chat.reasoning: strip",
        ),
        (
            makers.trl_template("qwen2_5").replace("message.content", "message.content | replace('second', '')"),
            "turns",
            "the answer's tokens read",
        ),
    ],
)
def test_mutated_template_fails_the_part_that_it_breaks(source: str, part: str, words: str) -> None:
    finding = _proof(source)[part]
    assert finding.state == ("absent" if "strip" in words else "failed") and words in finding.found


def test_template_that_cannot_be_opened_has_one_finding() -> None:
    def refuse() -> None:
        raise UserError("No chat template")

    assert prove_template(refuse) == (TemplateFinding("answers", "failed", "No chat template"),)  # type: ignore[arg-type]


def test_mutation_drops_no_turn_of_the_first_answer() -> None:
    assert _proof(FORGETFUL)["answers"].state == "passed"
