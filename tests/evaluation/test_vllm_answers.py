"""Evaluation on real vLLM: the same answers as the embedded loop's, each adapter's own, and evidence that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from making import vllm_architectures
from making.command_line import tunewright, write_jsonl
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.adapters.registry import LINEAGE, Adapter
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.engines import environment
from tunewright.engines.choice import EMBEDDED, AnswerEngine
from tunewright.evaluation.arm_runner import noise_floor
from tunewright.evaluation.generations import Generator
from tunewright.generation.requests import Completion, Request
from tunewright.metrics import scorer_of
from tunewright.models.bases import Base
from tunewright.training.self_samples import Sampler

pytestmark = pytest.mark.vllm

NEAR_TIE = 0.05
"""Nats by which a token may be less likely than the likeliest one, where engines add up in another order."""
LIMIT = 16


@pytest.fixture(scope="module")
def adapters(small_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    made = []
    for digest, folder in small_adapters.items():
        place = tmp_path_factory.mktemp("adapters") / f"small-{digest[:6]}"
        shutil.copytree(folder, place)
        write_json(place / LINEAGE, {"created": "2026-01-01T00:00:00+00:00", "digest": digest})
        made.append(Adapter(place))
    return made


@pytest.fixture(scope="module")
def generators(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Generator, Generator]]:
    """On peft and on vLLM, over one working folder."""
    base = Base("small", small_base, None, "LlamaForCausalLM", {"config.json": "0" * 64})
    work = tmp_path_factory.mktemp("work")
    engines = EMBEDDED, AnswerEngine("vllm", "it is what is tested", environment.find(environment.VLLM))
    peft, vllm = (
        Generator(base, chat_of(byte_tokenizer()), "float32", "none", 8, work, LogReporter(), engine=engine, rank=4)
        for engine in engines
    )
    yield peft, vllm
    assert vllm._vllm is not None
    vllm._vllm.stop()


def _prompts(generator: Generator, count: int) -> list[tuple[int, ...]]:
    begin = "The same beginning for all of them, longer than a block of the cache. " * 2
    return [generator.chat.prompt([Message("user", f"{begin}{n} {'word ' * n}")]) for n in range(count)]


def _raw(generator: Generator, prompts: Sequence[tuple[int, ...]], adapter: Adapter | None) -> list[Completion]:
    return generator.generate(generator.requests(prompts, LIMIT, adapter), adapter=adapter)


def _departs_at_a_near_tie(
    model: Any, adapter: Adapter | None, prompt: Sequence[int], one: Completion, other: Completion, end: int
) -> bool:
    """Return True if the first differing token is as good as the other engine's, by transformers' logits."""
    mine, theirs = [*one.ids, end], [*other.ids, end]
    place = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    ids = torch.tensor([[*prompt, *mine[:place]]])
    if adapter is not None:
        model.set_adapter(adapter.name)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    return bool((logits[mine[place]] - logits[theirs[place]]).abs() <= NEAR_TIE)


def test_greedy_answers_equal_the_embedded_loops_by_the_base_and_by_each_adapter(
    generators: tuple[Generator, Generator], adapters: list[Adapter]
) -> None:
    peft, vllm = generators
    prompts = _prompts(peft, 20)
    end = byte_tokenizer().eos_token_id
    asked: list[Adapter | None] = [None, *adapters, None]  # the base again, with an adapter in the slot
    theirs = [_raw(vllm, prompts, adapter) for adapter in asked]
    answers = set()
    for adapter, given in zip(asked, theirs, strict=True):
        ours = _raw(peft, prompts, adapter)
        for prompt, mine, other in zip(prompts, ours, given, strict=True):
            same = (mine.ids, mine.finish) == (other.ids, other.finish)
            assert same or _departs_at_a_near_tie(peft.model_with(adapter), adapter, prompt, mine, other, end)
        assert sum(a == b for a, b in zip(ours, given, strict=True)) >= 19
        answers.add(tuple(completion.ids for completion in given))
    assert len(answers) == 1 + len(adapters), "each model answers in its own way"


def test_stop_string_ends_the_answer_on_both_engines(generators: tuple[Generator, Generator]) -> None:
    peft, vllm = generators
    prompts = _prompts(peft, 6)
    whole = _raw(peft, prompts, None)
    text = peft.chat.text(whole[0].ids)
    stop = text[len(text) // 2 :][:2]
    asked = [Request(prompt, None, LIMIT, stop=(stop,)) for prompt in prompts]
    ours, theirs = peft.generate(asked), vllm.generate(asked)
    assert ours == theirs
    assert ours[0].before_stop == text.partition(stop)[0]


def test_journals_differ_by_engine_and_hold_the_same_answers(
    generators: tuple[Generator, Generator], adapters: list[Adapter]
) -> None:
    prompts = _prompts(generators[0], 4)
    ours, theirs = (generator.answer("x", prompts, LIMIT, adapters[0]) for generator in generators)
    assert ours == theirs
    journals = [
        generator.folder / f"{generator.decoding(LIMIT, adapters[0]).key[:16]}.jsonl" for generator in generators
    ]
    first, second = ({line for line in journal.read_text().split("\n") if line} for journal in journals)
    assert journals[0] != journals[1]
    assert first == second


def test_noise_floor_uses_the_answering_engine(generators: tuple[Generator, Generator]) -> None:
    _, vllm = generators
    prompts = _prompts(vllm, 10)
    members = [
        Member(Example((Message("user", str(n)), Message("assistant", "x"))), f"{n:064x}", "test", str(n))
        for n in range(10)
    ]
    noise = noise_floor(vllm, members, prompts, LIMIT, scorer_of("exact_match", vllm.folder), seed=0)
    assert (noise.items, "in float32 with vllm" in noise.how) == (10, True)
    assert noise.changed <= 1


def test_samples_are_reproducible_by_seed(generators: tuple[Generator, Generator], tmp_path: Path) -> None:
    peft, vllm = generators
    drawn = []
    for number, generator in enumerate((vllm, vllm, peft)):
        sampler = Sampler(
            generator.base,
            generator.chat,
            generator.inputs,
            generator.write,
            0,
            "replay",
            tmp_path / str(number),
            LogReporter(),
        )
        drawn.append(([s.ids for s in sampler._write(range(4))], sampler.folder.name))
    first, again, embedded = drawn
    assert first == again
    assert first[1] != embedded[1], "another engine draws other samples, under another key"


def test_evaluate_names_vllm_in_its_evidence_and_finds_its_answers_again(small_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n * 7919 % 10007} {'ab' * (n % 7)}", "completion": f"{n * 7919 % 10007}"} for n in range(120)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = (
        f"name: small\nbase_model: {small_base}\ndata:\n  sources: [pairs.jsonl]\n"
        "train:\n  preset: all-linear\n  batch_size: 8\n  epochs: 1\n  dtype: float32\n  eval_max_samples: 0\n"
        "evaluate:\n  num_fewshot: [1]\n  static_seeds: 1\n  retrievers: [bm25]\n  engine: ENGINE\n"
        "regressions:\n  samples: 0\n"
    )
    (tmp_path / "tunewright.yaml").write_text(config.replace("ENGINE", "vllm"))
    for command in (("data", "add", tmp_path / "pairs.jsonl"), ("train",)):
        ran = tunewright(*command, "-p", tmp_path)
        assert ran.code == 0, ran.stderr
    ran = tunewright("evaluate", "-p", tmp_path, "--json")
    assert ran.code == 0, ran.stderr
    evidence = ran.document["evidence"]
    assert (evidence["engine"]["name"], evidence["engine"]["version"]) == ("vllm", "0.32.0")
    assert "with vllm" in evidence["noise_floor"]["how"]
    assert "Starting vLLM" in ran.stderr

    (tmp_path / "tunewright.yaml").write_text(config.replace("ENGINE", "peft"))
    ran = tunewright("evaluate", "-p", tmp_path, "--json")
    assert ran.code == 0, ran.stderr
    other = ran.document["evidence"]
    assert (other["engine"]["name"], other["id"] == evidence["id"]) == ("peft", False)
    scores = [{arm["name"]: arm["scores"] for arm in each["arms"]} for each in (evidence, other)]
    assert json.dumps(scores[0]["zero-shot"]) == json.dumps(scores[1]["zero-shot"])


def test_listed_architectures_are_those_of_the_installed_vllm() -> None:
    (package,) = environment.find(environment.VLLM).folder.glob("lib/python3*/site-packages/vllm")
    assert vllm_architectures.listing(package) == vllm_architectures.FILE.read_text(encoding="utf-8")
