"""Answers of workers in batches: those of one process, whatever a request needs; and what a machine must have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from hypothesis import given
from hypothesis import strategies as st

from making.pickled_workers import PickledModels
from making.small_adapters import lora_weights, write_adapter
from tunewright.adapters.registry import LINEAGE, Adapter
from tunewright.chat import open_chat
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.data.examples import Message
from tunewright.data.versions import Member
from tunewright.evaluation import answer_worker
from tunewright.evaluation.answer_worker import _parts
from tunewright.evaluation.arm_runner import noise_floor
from tunewright.evaluation.generations import ArmPrompts, Generator
from tunewright.generation.constraints import Grammar
from tunewright.metrics import scorer_of
from tunewright.models.bases import Base, base_here, resolve_base


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """A worker has loaded nothing."""
    answer_worker._loaded.clear()
    yield
    answer_worker._loaded.clear()


@pytest.fixture
def base(tiny_base_folder: Path, tmp_path: Path) -> Base:
    return resolve_base(str(tiny_base_folder), None, tmp_path, Listener())


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    folder = write_adapter(tmp_path / "adapters" / "small-0123", weights=lora_weights(size=0.4))
    write_json(folder / LINEAGE, {"created": "2026-01-01T00:00:00+00:00", "digest": "0123" * 16})
    return Adapter(folder)


def _generator(base: Base, work: Path, workers: PickledModels | None = None, **options: Any) -> Generator:
    return Generator(base, open_chat(base), "float32", "none", 4, work, Listener(), workers=workers, **options)


def _prompts(generator: Generator, count: int) -> list[tuple[int, ...]]:
    return [generator.prompt([Message("user", "word " * n)]) for n in range(1, count + 1)]


def test_answers_of_workers_are_those_of_one_process(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    workers, grammar = PickledModels(), Grammar.regex("[a-z]{2,5}")
    here = _generator(base, tmp_path / "here", stop=("e",), grammar=grammar)
    there = _generator(base, tmp_path / "there", workers, stop=("e",), grammar=grammar)
    prompts = _prompts(here, 19)
    _prompts(there, 19)
    for asked, constrained in ((None, False), (adapter, False), (None, True), (adapter, True)):
        whole = here.answer("x", prompts, 8, asked, constrained=constrained)
        assert there.answer("x", prompts, 8, asked, constrained=constrained) == whole
    assert workers.sizes == [7, 6, 6] * 4
    journals = [
        {file.name: set(file.read_text().split("\n")) for file in one.folder.iterdir()} for one in (here, there)
    ]
    assert len(journals[0]) == 4
    assert journals[0] == journals[1]
    workers.sizes.clear()
    there.answer("x", [*prompts, there.prompt([Message("user", "new")])], 8)
    assert workers.sizes == [1]


def test_calls_of_each_rows_functions_are_the_grammar_in_workers_too(base: Base, tmp_path: Path) -> None:
    from tunewright.chat.call_grammar import CallGrammars
    from tunewright.config import ChatConfig

    chat = open_chat(base, ChatConfig(tools="hermes"))
    functions = [
        Message("tools", f'[{{"function":{{"name":"f{n}","parameters":{{}}}},"type":"function"}}]') for n in range(3)
    ]
    answers = []
    for workers in (None, PickledModels()):
        work = tmp_path / str(workers is None)
        grammar = CallGrammars("required")
        generator = Generator(base, chat, "float32", "none", 4, work, Listener(), workers=workers, grammar=grammar)
        prompts = [generator.prompt([declared, Message("user", "x")]) for declared in functions]
        prompts.append(generator.prompt([Message("user", "x")]))
        answers.append(generator.answer("x", prompts, 24, constrained=True))
    assert answers[0] == answers[1]
    for number, answer in enumerate(answers[0][:3]):
        assert f"f{number}" in answer.text


def test_noise_floor_is_measured_in_batches_of_other_sizes(base: Base, tmp_path: Path) -> None:
    from tunewright.data.examples import Example

    workers = PickledModels()
    generator = _generator(base, tmp_path, workers)
    members = [
        Member(Example((Message("user", f"word {n}"), Message("assistant", "x"))), f"{n:064x}", "test", str(n))
        for n in range(20)
    ]
    prompts = [generator.chat.prompt(member.example.prompt) for member in members]
    noise = noise_floor(generator, members, prompts, 2, scorer_of("exact_match", tmp_path), seed=0)
    assert (noise.items, noise.changed) == (20, 0)
    assert workers.sizes == [7, 7, 6, 4, 4, 4, 4, 4]
    assert not generator.folder.exists()


@given(st.integers(0, 5000), st.integers(1, 40))
def test_parts_hold_every_request_once_and_are_of_nearly_one_size(count: int, rows: int) -> None:
    parts = list(_parts(count, rows))
    assert [place for part in parts for place in part] == list(range(count))
    lengths = {len(part) for part in parts}
    assert not lengths or (max(lengths) <= 8 * rows and max(lengths) - min(lengths) <= 1)
    # Long parts leave work for 16 workers.
    assert len(parts) >= 16 or all(length <= 2 * rows for length in lengths)


@pytest.mark.parametrize(("count", "parts"), [(16, 1), (17, 2), (256, 16), (1024, 16), (2000, 32)])
def test_many_requests_make_fewer_and_fuller_parts(count: int, parts: int) -> None:
    assert len(list(_parts(count, 8))) == parts


def test_base_here_and_in_workers_is_not_in_memory_at_once(base: Base, tmp_path: Path) -> None:
    workers = PickledModels()
    generator = _generator(base, tmp_path, workers)
    generator.model_with()
    assert workers.stopped == 1
    generator.answer("x", _prompts(generator, 1), 2)
    assert not generator._embedded.loaded


def test_arms_are_answered_together_and_no_prompt_twice(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    here, workers = _generator(base, tmp_path / "here"), PickledModels()
    there = _generator(base, tmp_path / "there", workers)
    prompts = _prompts(here, 20)
    arms = [
        ArmPrompts("zero-shot", prompts[:10]),
        ArmPrompts("tuned", prompts[:9], adapter),
        ArmPrompts("retrieved-1", [*prompts[5:], prompts[19]]),
    ]
    given = there.answer_arms(arms, 8)
    assert workers.sizes == [5, 5, 5, 4, 5, 5]
    assert given == here.answer_arms(arms, 8) == there.answer_arms(arms, 8)
    assert len(workers.sizes) == 6
    assert isinstance(there.reporter, Listener)
    assert there.reporter.steps == {"zero-shot": (10, 10), "tuned": (9, 9), "retrieved-1": (10, 10)}


def test_worker_warns_through_the_command(base: Base, tmp_path: Path) -> None:
    import torch

    generator = _generator(base, tmp_path / "one", PickledModels())
    whole = generator.answer("x", _prompts(generator, 3), 4)
    (loaded,) = answer_worker._loaded.values()
    assert isinstance(loaded, answer_worker._Embedded)

    def fail(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    loaded.answers.model_with().register_forward_pre_hook(fail, with_kwargs=True)
    again = _generator(base, tmp_path / "two", PickledModels())
    assert again.answer("x", _prompts(again, 3), 4) == whole
    assert isinstance(again.reporter, Listener)
    assert again.reporter.warned == ["Memory ran out with 4 rows at once. Decoding continues with 2."]


def test_base_of_another_machine_is_checked(base: Base, tmp_path: Path) -> None:
    assert base_here(base) == base
    copied = replace(base, folder=tmp_path / "copy")
    with pytest.raises(UserError, match=r"The base .* is missing: no folder .*copy\nCopy it to the same folder"):
        base_here(copied)
    shutil.copytree(base.folder, copied.folder)
    assert base_here(copied) == copied
    (copied.folder / "config.json").write_text("{}")
    (copied.folder / "chat_template.jinja").write_text("x")
    with pytest.raises(UserError, match=r"is another one: chat_template\.jinja, config\.json"):
        base_here(copied)
    hub = replace(base, spec="someone/some-base", commit="0" * 40)
    with pytest.raises(UserError, match=r"hf download someone/some-base --revision 0{40}"):
        base_here(hub)
