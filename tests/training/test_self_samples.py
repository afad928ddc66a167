"""Self-samples of the base: the start and end of its turns, the draw, and usable samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from replay_helpers import replay_project, shorten_turns

import tunewright
from making.makers import llama2_tokenizer, llama3_tokenizer, mistral_tokenizer
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message, normalised
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion
from tunewright.models.loading import load_model
from tunewright.training import self_samples
from tunewright.training.self_samples import BATCH, Sampler, _answer, _instruction, sample_filter


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_turns(monkeypatch)


def _sampler(project: Project, load: Any, seed: int = 0, purpose: str = "replay") -> Sampler:
    def complete(requests: Any, ends: Any, on_finished: Any) -> Any:
        pad = project.chat.tokenizer.pad_token_id
        return generate(load(), requests, stop_ids=ends, pad_id=pad, batch_size=BATCH, on_finished=on_finished)

    return Sampler(project.base, project.chat, {}, complete, seed, purpose, project.folder.work, project.reporter)


# How a template's user turn begins and ends

# Functions, because loading a tokenizer takes seconds, which collecting any test would wait for.
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "llama2": llama2_tokenizer,
    "llama3": llama3_tokenizer,
    "v3": partial(mistral_tokenizer, "v3"),
    "tekken": partial(mistral_tokenizer, "tekken"),
}


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize(
    ("tokenizer", "kind", "opening", "ends"),
    [
        ("bytes", "own", "<|im_start|>user\n", {"<|im_end|>"}),
        pytest.param(
            "llama3",
            "own",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            {"<|eot_id|>"},
            marks=pytest.mark.slow,
        ),
        ("v3", "own", "<s>[INST]", {"</s>", "[/INST]"}),
        pytest.param("tekken", "own", "<s>[INST]", {"</s>", "[/INST]"}, marks=pytest.mark.slow),
    ],
    indirect=["tokenizer"],
)
def test_user_turn_starts_with_the_template_and_ends_with_its_token(
    tokenizer: Any, kind: Any, opening: str, ends: set[str]
) -> None:
    turn = chat_of(tokenizer, kind).user_turn()
    assert tokenizer.decode(turn.opening) == opening
    assert set(tokenizer.convert_ids_to_tokens(sorted(turn.end_ids))) == ends
    assert turn.end_text is None


@pytest.mark.parametrize(
    ("tokenizer", "kind", "begin", "end"),
    [
        ("llama2", "own", "[INST]", "[/INST]"),
        ("bytes", "plain", "### Instruction:", "### Response:"),
    ],
    indirect=["tokenizer"],
)
def test_turn_without_end_token_ends_with_text(tokenizer: Any, kind: Any, begin: str, end: str) -> None:
    turn = chat_of(tokenizer, kind).user_turn()
    assert (turn.begin_text, turn.end_text) == (begin, end)


@pytest.mark.parametrize("tokenizer", ["bytes", "v3"], indirect=True)
def test_opening_is_the_beginning_of_a_prompt(tokenizer: Any) -> None:
    chat = chat_of(tokenizer)
    opening = chat.user_turn().opening
    assert chat.prompt([Message("user", "What is the time?")])[: len(opening)] == opening


def test_instruction_is_cut_at_end_text_and_missing_without_an_end() -> None:
    chat = chat_of(byte_tokenizer(), "plain")

    def wrote(text: str, finish: Any) -> Completion:
        return Completion(tuple(chat.tokenizer(text)["input_ids"]), finish)

    assert _instruction(chat, "### Response:", wrote("Add 2.\n\n### Response:\n4", "length")) == "Add 2."
    assert _instruction(chat, "### Response:", wrote("Add 2.\n\nAnd then", "length")) == "Add 2."
    assert _instruction(chat, "### Response:", wrote("Add 2 and", "length")) is None
    assert _instruction(chat, None, wrote("Add 2.\n\nAnd then", "length")) is None
    assert _answer(chat, "### Instruction:", wrote("4\n\n### Instruction:\nAdd", "length")) == ("4", "", True)
    assert _answer(chat, None, wrote("4 and\nso on", "length")) == ("4 and\nso on", "", False)


# The draw


@pytest.mark.slow
def test_draw_depends_on_seed_and_purpose_alone_and_is_kept(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = replay_project(tmp_path / "a", tiny_base_folder)
    model = load_model(project.base, "float32", "none")

    def drawn(wanted: int = 5, load: Any = lambda: model, where: Project = project, **how: Any) -> Any:
        return _sampler(where, load, **how).draw(wanted, lambda examples: {}, finished=True)

    def never() -> Any:
        raise AssertionError("what was drawn is kept")

    first = drawn()
    assert drawn(load=never) == first
    assert drawn(where=replay_project(tmp_path / "b", tiny_base_folder)).text == first.text
    assert len({first.text, drawn(seed=1).text, drawn(purpose="held-out").text}) == 3
    large = drawn(8)
    assert large.used[:5] == first.used, "a small draw is the start of a larger one"
    assert len({normalised(s.instruction) for s in large.used}) == 8


@pytest.mark.parametrize(("wanted", "chunk"), [(1, 1), (4, 6), (11, 16), (16, 24), (40, 24)])
def test_draw_writes_half_as_many_more_as_asked_for_at_most(
    tmp_path: Path, tiny_base_folder: Path, wanted: int, chunk: int
) -> None:
    project = replay_project(tmp_path / "project", tiny_base_folder)
    text = "Why is the sky blue?"
    asked: list[int] = []

    def complete(requests: Any, _ends: Any, _on_finished: Any) -> list[Completion]:
        asked.append(len(requests))
        said = [f"{text} {sum(asked)}-{n}" for n in range(len(requests))]
        return [Completion(tuple(project.chat.tokenizer(one)["input_ids"]), "stop") for one in said]

    sampler = Sampler(
        project.base, project.chat, {}, complete, 0, "replay", project.folder.work, project.reporter, wanted
    )
    drawn = sampler.draw(wanted, lambda examples: {}, finished=True)
    assert len(drawn.used) == wanted
    assert asked == [chunk] * 2 * -(-wanted // chunk), "instructions and answers"


def test_draw_leaves_out_unusable_samples_and_counts_them(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = replay_project(tmp_path / "project", tiny_base_folder)
    model = load_model(project.base, "float32", "none")
    sampler = _sampler(project, lambda: model)
    chunk = sampler._chunk(0)
    whole = [s for s in chunk if s.fault is None and s.finished]
    assert len(whole) >= 4
    assert {s.fault for s in chunk} >= {None, self_samples.CUT_OFF}
    unfinished = next(s for s in chunk if not s.finished and s.number < whole[3].number)
    # The second of those that are whole now repeats the first.
    twin = replace(whole[1], instruction=whole[0].instruction.upper() + " ")
    rows = [twin if s.number == twin.number else s for s in chunk]
    file = next(sampler.folder.iterdir())
    file.write_text(json.dumps([s.__dict__ for s in rows]))
    screened = {whole[2].example.pair_key: "nearly equal to the row 0123"}
    drawn = sampler.draw(len(whole) - 2, lambda examples: screened, finished=True)
    assert [s.number for s in drawn.used] == [s.number for s in (whole[0], *whole[3:])]
    assert drawn.left_out[twin.number] == self_samples.REPEATED
    assert drawn.left_out[whole[2].number] == "nearly equal to the row 0123"
    assert drawn.left_out[unfinished.number] == self_samples.CUT_OFF
    numbers = {s.number for s in drawn.used} | set(drawn.left_out)
    assert numbers == set(range(max(s.number for s in whole) + 1)), "each sample is used or has a reason"
    assert f"{len(drawn.used)} of {len(numbers)} samples" in drawn.summary()


def test_samples_are_dissimilar_to_domain_and_held_out_rows(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = replay_project(tmp_path / "project", tiny_base_folder)
    version = project.data.version()
    screen = sample_filter(project.folder, version, project.chat, 400, project.reporter)
    test, train = version.examples("test")[0].example.input_text, version.examples("train")[0].example.input_text
    message = {
        "copy of a training row": train + ".",
        "copy of a test row": test.upper(),
        "too long": "many words " * 40,
        "fine": "Why is the sky blue?",
    }
    examples = {name: Example((Message("user", text), Message("assistant", "so"))) for name, text in message.items()}
    by_key = {example.pair_key: name for name, example in examples.items()}
    reasons = {by_key[key]: reason for key, reason in screen({e.pair_key: e for e in examples.values()}).items()}
    assert reasons.keys() == message.keys() - {"fine"}
    assert "nearly equal to the row" in reasons["copy of a training row"]
    assert "nearly equal to the held-out (test) row" in reasons["copy of a test row"]
    assert "longer than 400 tokens" in reasons["too long"]


def test_draw_refuses_a_base_without_usable_samples(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_samples, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(self_samples, "INSTRUCTION_TOKENS", 1)
    with pytest.raises(UserError, match="The base writes no usable sample") as caught:
        replay_project(tmp_path / "project", tiny_base_folder).train()
    assert caught.value.where == "train.replay"


@pytest.mark.parametrize("value", ["selff", "{samples: 0}", "{kl_coef: 0}"])
def test_config_refuses_an_invalid_replay_with_its_line(value: str, tmp_path: Path, tiny_base_folder: Path) -> None:
    project = replay_project(tmp_path / "project", tiny_base_folder)
    file = project.folder.root / "tunewright.yaml"
    file.write_text(file.read_text().replace("replay: {samples: 6}", f"replay: {value}"))
    with pytest.raises(UserError) as caught:
        _ = tunewright.open(project.folder.root).folder.config
    assert "replay" in str(caught.value)


def test_replay_self_means_the_defaults() -> None:
    from tunewright.config import ReplayConfig, TrainConfig

    assert TrainConfig.model_validate({"replay": "self"}).replay == ReplayConfig()
