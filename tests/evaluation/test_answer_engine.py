"""Choice of the evaluation engine, and vLLM answering lists of requests, with a stand-in for vLLM."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from making.fake_vllm import DIE, FAIL
from making.vllm_child import StopAfter, alive, children_of, install_fake, wait_until
from tunewright.chat import open_chat
from tunewright.config import Config, EvaluateConfig, TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.engines import choice
from tunewright.engines.choice import AnswerEngine, answer_engine
from tunewright.engines.vllm import answers as answers_module
from tunewright.engines.vllm.answers import VllmAnswers, gpu_share, rows_at_once
from tunewright.engines.vllm.engine import VllmEngine
from tunewright.evaluation.arm_runner import noise_floor
from tunewright.evaluation.generations import Generator
from tunewright.generation.requests import Completion, Request
from tunewright.metrics import scorer_of
from tunewright.models.bases import Base, resolve_base

END = 4


def _config(engine: Any = "auto", **train: Any) -> Config:
    return Config(evaluate=EvaluateConfig(engine=engine), train=TrainConfig(**train))


# The choice


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a CUDA card."""
    monkeypatch.setattr(choice, "device", lambda: "cuda:0")


def test_auto_uses_peft_without_a_card_even_with_vllm_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(monkeypatch, tmp_path)
    assert answer_engine(_config(), "none") == AnswerEngine("peft", "there is no CUDA card")


@pytest.mark.usefixtures("card")
def test_auto_uses_vllm_with_a_card_and_its_cuda_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert (answer_engine(_config(), "none").name, "engine install vllm" in answer_engine(_config(), "none").why) == (
        "peft",
        True,
    )
    install_fake(monkeypatch, tmp_path, "cpu")
    assert answer_engine(_config(), "none").name == "peft", "the build without CUDA is slower than peft on the card"
    install_fake(monkeypatch, tmp_path, "cuda")
    chosen = answer_engine(_config(), "none")
    assert (chosen.name, chosen.versions) == ("vllm", {"vllm": "0.32.0", "torch": "2.13.0+fake"})


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("config", "asked", "why"),
    [
        ({}, {"quantization": "nf4"}, "held in NF4"),
        ({}, {"quantization": "none", "constrained": True}, "evaluate.structured_outputs"),
        ({"use_dora": True, "require_vllm_compatible": False}, {"quantization": "none"}, "does not load DoRA"),
    ],
)
def test_auto_uses_peft_and_vllm_refuses_what_vllm_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, asked: Any, why: str
) -> None:
    install_fake(monkeypatch, tmp_path, "cuda")
    quantization, constrained = asked["quantization"], asked.get("constrained", False)
    chosen = answer_engine(_config(**config), quantization, constrained=constrained)
    assert (chosen.name, why in chosen.why) == ("peft", True)
    with pytest.raises(UserError, match=why) as refused:
        answer_engine(_config("vllm", **config), quantization, constrained=constrained)
    assert refused.value.where == "evaluate.engine"


@pytest.mark.usefixtures("card")
def test_engine_choice_uses_the_adapters_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, tmp_path, "cuda")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "use_dora": True}))
    assert answer_engine(_config(), "none", adapter=tmp_path).name == "peft"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    assert answer_engine(_config(use_dora=True, require_vllm_compatible=False), "none", adapter=tmp_path).name == "vllm"


@pytest.mark.usefixtures("card")
def test_auto_answers_by_peft_with_the_reason_when_vllm_does_not_start(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(monkeypatch, tmp_path, "cuda")
    (tmp_path / "orders").write_text("RuntimeError: no kernel image is available")
    monkeypatch.setattr(answers_module, "_card_memory", lambda: (80 << 30, 80 << 30))
    reporter = StopAfter()
    project = ProjectFolder(tmp_path, _config())
    for _ in range(2):
        generator = Generator.of(project, base, open_chat(base), "none", reporter)
        assert (generator.used.name, generator.used.why) == ("peft", "vLLM failed to start")
    (warning,) = reporter.warnings
    assert "no kernel image is available" in warning
    assert len(generator.answer("x", [(5,)], 2)) == 1
    with pytest.raises(UserError, match="no kernel image"):
        Generator.of(ProjectFolder(tmp_path, _config("vllm")), base, open_chat(base), "none", reporter).answer(
            "x", [(5,)], 2
        )


@pytest.mark.usefixtures("card")
def test_auto_starts_vllm_on_trial_once_for_a_base(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, tmp_path, "cuda")
    monkeypatch.setattr(answers_module, "_card_memory", lambda: (80 << 30, 80 << 30))
    before, reporter = set(children_of(os.getpid())), StopAfter()
    assert answer_engine(_config(), "none", start_on=(base, reporter)).name == "vllm"
    assert not [child for child in children_of(os.getpid()) if child not in before and alive(child)]
    (tmp_path / "orders").write_text("it would not start again")
    assert answer_engine(_config(), "none", start_on=(base, reporter)).name == "vllm"
    assert answer_engine(_config(), "none", start_on=(replace(base, files={}), reporter)).name == "peft"


def test_vllm_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="vLLM is not installed") as refused:
        answer_engine(_config("vllm"), "none")
    assert "tunewright engine install vllm" in (refused.value.fix or "")


def test_rows_and_memory_follow_the_card() -> None:
    gib = 1 << 30
    assert [rows_at_once(size * gib) for size in (8, 16, 24, 40, 80)] == [64, 64, 128, 256, 256]
    assert gpu_share(79 * gib, 80 * gib) == 0.9
    assert gpu_share(40 * gib, 80 * gib) == 0.45
    with pytest.raises(UserError, match="Not enough GPU memory for vLLM"):
        gpu_share(8 * gib, 80 * gib)


# Lists of requests


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerEngine:
    """vLLM, played by the stand-in: it answers 1, 2, 3, … and ends on a stop token."""
    install_fake(monkeypatch, tmp_path)
    return answer_engine(_config("vllm"), "none")


@pytest.fixture
def answers(engine: AnswerEngine, small_base: Path) -> Iterator[VllmAnswers]:
    assert engine.environment is not None
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    vllm = VllmAnswers(base, "float32", engine.environment, 2, 4, LogReporter())
    try:
        yield vllm
    finally:
        vllm.stop()


def _running(vllm: VllmAnswers) -> VllmEngine:
    assert vllm._engine is not None
    return vllm._engine


def _seen(vllm: VllmAnswers) -> dict[str, Any]:
    transport = httpx.HTTPTransport(uds=str(_running(vllm).child.socket))
    with httpx.Client(transport=transport) as client:
        seen: dict[str, Any] = client.get("http://vllm/metrics").json()
        return seen


def test_answers_come_in_order_and_end_at_the_stop_tokens_and_strings_of_each_call(answers: VllmAnswers) -> None:
    reported: list[int] = []
    asked = [Request((5, 6), None, 2), Request((7,), None, 9), Request((8,), None, 1)]
    got = answers.generate(asked, stop_ids={END}, on_finished=lambda index, _completion: reported.append(index))
    assert got == [Completion((1, 2), "length"), Completion((1, 2, 3), "stop"), Completion((1,), "length")]
    assert sorted(reported) == [0, 1, 2]

    text = "abcdefghi"
    cut = Request((7,), None, 9, stop=("de", "never"))
    (ended,) = answers.generate([cut], stop_ids=set(), decode=lambda ids: "".join(text[i - 1] for i in ids))
    assert ended == Completion((1, 2, 3, 4, 5), "stop", "abc")
    wait_until(lambda: _seen(answers)["hung_up"] == 1)  # what follows the stop string is not computed


def test_vllm_keeps_the_configured_number_of_requests(answers: VllmAnswers) -> None:
    answers.generate([Request((5,), None, 20) for _ in range(12)], stop_ids=(), at_once=3)
    assert _seen(answers)["most_at_once"] == 3
    answers.generate([Request((5,), None, 20) for _ in range(12)], stop_ids=())
    assert _seen(answers)["most_at_once"] == 4, "twice the rows, so that none waits for the next request"


def test_vllm_loads_one_adapter_in_two_slots_and_restarts_for_a_higher_rank(
    answers: VllmAnswers, small_adapters: dict[str, Path], small_base: Path, tmp_path: Path
) -> None:
    from making.engine_models import write_adapter

    for digest, folder in small_adapters.items():
        answers.generate([Request((5,), digest, 1)], stop_ids=(), adapters={digest: folder})
        assert _seen(answers)["body"]["model"] == digest
    options = _seen(answers)["options"]
    assert options[options.index("--max-loras") + 1] == "2", "one to spare: the last slot answers for the base"
    assert len(_seen(answers)["evicted"]) == len(small_adapters) - 1

    digest, folder = write_adapter(small_base, tmp_path / "high", seed=9, rank=12)
    before = _running(answers)
    answers.generate([Request((5,), digest, 1)], stop_ids=(), adapters={digest: folder})
    options = _seen(answers)["options"]
    assert (options[options.index("--max-lora-rank") + 1], before is _running(answers)) == ("16", False)
    assert not alive(before.child.process_id or 0)


def test_vllm_ends_when_stopped_or_unreferenced(engine: AnswerEngine, small_base: Path) -> None:
    assert engine.environment is not None
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    vllm = VllmAnswers(base, "float32", engine.environment, 2, 4, LogReporter())
    processes = []
    for _ in range(2):
        vllm.generate([Request((5,), None, 1)], stop_ids=())
        processes.append(_running(vllm).child.process_id or 0)
        assert alive(processes[-1])
        vllm.stop()
        assert not alive(processes[-1])
    vllm.generate([Request((5,), None, 1)], stop_ids=())
    process, folder = _running(vllm).child.process_id or 0, _running(vllm).child.folder
    del vllm
    gc.collect()
    assert (alive(process), folder.exists()) == (False, False)


def test_vllm_refuses_a_long_prompt_before_answering(answers: VllmAnswers) -> None:
    reported: list[int] = []
    asked = [Request((5,), None, 1), Request((5,) * 500, None, 20)]
    with pytest.raises(UserError, match=r"need 520 tokens \(vLLM's limit: 512\)"):
        answers.generate(asked, stop_ids=(), on_finished=lambda index, _completion: reported.append(index))
    assert reported == []


def test_vllm_reports_a_failed_request_and_answers_the_next_list(answers: VllmAnswers) -> None:
    with pytest.raises(UserError, match="vLLM could not answer"):
        answers.generate([Request((FAIL,), None, 5)], stop_ids=())
    assert answers.generate([Request((5,), None, 1)], stop_ids=()) == [Completion((1,), "length")]


def test_callback_exception_reaches_the_caller(answers: VllmAnswers) -> None:
    def full(_index: int, _completion: Completion) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        answers.generate([Request((5,), None, 1)] * 5, stop_ids=(), on_finished=full)


def test_vllm_answers_inside_a_running_event_loop(answers: VllmAnswers) -> None:
    import asyncio

    async def cell() -> list[Completion]:
        return answers.generate([Request((5,), None, 1)], stop_ids=())

    assert asyncio.run(cell()) == [Completion((1,), "length")]


# Evaluation's answers


@pytest.fixture
def base(tiny_base_folder: Path, tmp_path: Path) -> Base:
    return resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())


def _generator(base: Base, work: Path, engine: AnswerEngine, reporter: LogReporter | None = None) -> Generator:
    reported = reporter or LogReporter()
    return Generator(base, open_chat(base), "float32", "none", 4, work, reported, engine=engine)


def test_engines_have_separate_journals(base: Base, engine: AnswerEngine, tmp_path: Path) -> None:
    peft, vllm = _generator(base, tmp_path, AnswerEngine("peft", "")), _generator(base, tmp_path, engine)
    ours, theirs = (each.decoding(8, None) for each in (peft, vllm))
    assert (ours.engine, theirs.engine) == ("decoding-2", "vllm-1")
    assert (theirs.packages["vllm"], theirs.packages["torch"]) == ("0.32.0", "2.13.0+fake")
    assert ours.key != theirs.key
    assert (peft.inputs, vllm.inputs) == (peft.weights, {**peft.weights, "engine": "vllm"})
    assert (vllm.used.name, vllm.used.version, vllm.used.device) == ("vllm", "0.32.0", "cpu")


def test_vllm_crash_keeps_finished_answers_and_repeats_the_others(
    base: Base, engine: AnswerEngine, tmp_path: Path
) -> None:
    prompts = [(n, 5) for n in range(9)]
    work = tmp_path / "work"
    dying = _generator(base, work, engine)
    with pytest.raises(UserError, match="vLLM stopped before all answers were complete") as stopped:
        dying.answer("x", [*prompts, (DIE,)], 3)
    assert "Run the same command again" in (stopped.value.fix or "")
    (journal,) = (work / "generations").iterdir()
    kept = [line for line in journal.read_text().split("\n") if line]
    assert 0 < len(kept) < 10

    again = _generator(base, work, engine)
    asked: list[Request] = []
    generate = again.generate

    def recording(requests: Any, *rest: Any, **options: Any) -> Any:
        asked.extend(requests)
        return generate(requests, *rest, **options)

    again.generate = recording  # type: ignore[method-assign]
    given = again.answer("x", prompts, 3)
    assert len(asked) == len(prompts) - len(kept)
    assert {g.text for g in given} == {again.chat.text([1, 2, 3])}
    assert [g.truncated for g in given] == [True] * 9


def test_vllm_and_an_embedded_base_are_never_in_memory_together(
    base: Base, engine: AnswerEngine, tmp_path: Path
) -> None:
    generator = _generator(base, tmp_path / "work", engine)
    generator.answer("x", [(5,)], 1)
    assert generator._vllm is not None
    process = _running(generator._vllm).child.process_id or 0
    generator.model_with()
    assert not alive(process)
    generator.answer("x", [(6,)], 1)
    assert not generator._embedded.loaded


def test_unreferenced_generator_ends_vllm(base: Base, engine: AnswerEngine, tmp_path: Path) -> None:
    generator = _generator(base, tmp_path / "work", engine)
    generator.answer("x", [(5,)], 1)
    assert generator._vllm is not None
    process = _running(generator._vllm).child.process_id or 0
    gc.disable()
    try:
        del generator
        assert not alive(process), "the next model that is loaded must find the memory free"
    finally:
        gc.enable()


def test_noise_floor_uses_a_smaller_second_batch(base: Base, engine: AnswerEngine, tmp_path: Path) -> None:
    generator = Generator(base, open_chat(base), "float32", "none", 256, tmp_path / "w", LogReporter(), engine=engine)
    members = [
        Member(Example((Message("user", str(n)), Message("assistant", "x"))), f"{n:064x}", "test", str(n))
        for n in range(12)
    ]
    prompts = [(n, 5) for n in range(12)]
    noise = noise_floor(generator, members, prompts, 20, scorer_of("exact_match", tmp_path), seed=0)
    assert "with vllm: batches of 12, then of 6 in another order" in noise.how
    assert generator._vllm is not None
    assert _seen(generator._vllm)["most_at_once"] == 12
    assert not (tmp_path / "w" / "generations").exists(), "past the journal"
