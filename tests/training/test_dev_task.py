"""Dev rows that are answered during training."""

from __future__ import annotations

from pathlib import Path

from making.memory_limit import run_out_of_memory
from making.vllm_child import StopAfter
from tunewright.chat import open_chat
from tunewright.config import Config
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.models.bases import resolve_base
from tunewright.training.monitoring import dev_task


def _member(asked: str, answered: str) -> Member:
    example = Example((Message("user", asked), Message("assistant", answered)))
    return Member(example, example.pair_key, "dev", asked)


def test_dev_task_answers_equal_prompts_once_and_scores_every_row(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())
    chat = open_chat(base)
    rows = [_member("one", "a"), _member("two", "b"), _member("one", "c"), _member("three", "d"), _member("one", "e")]
    config = Config.model_validate({"name": "tiny", "base_model": str(tiny_base_folder)})
    task = dev_task(config, tmp_path, chat, rows, rows, 512, LogReporter())
    assert task is not None
    assert [r.prompt_ids for r in task.requests] == [
        chat.prompt([Message("user", asked)]) for asked in ("one", "two", "three")
    ]
    assert task.score(["c", "x", "d"]) == 4 / 5  # any reference of "one" counts


def test_dev_task_scores_a_sample_by_the_references_of_all_dev_rows(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())
    rows = [_member("one", letter) for letter in "abcd"]
    settings = {"name": "tiny", "base_model": str(tiny_base_folder), "train": {"eval_max_samples": 2}}
    task = dev_task(Config.model_validate(settings), tmp_path, open_chat(base), rows, rows, 512, LogReporter())
    assert task is not None
    assert (len(task.requests), len(task.examples)) == (1, 2)
    assert [task.score([letter]) for letter in "abcdx"] == [1, 1, 1, 1, 0]


def test_dev_answers_equal_those_of_fewer_rows_when_memory_runs_out(tiny_base_folder: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    from tunewright.models.loading import load_model
    from tunewright.training.lora import lora_config

    base = resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())
    rows = [_member("word " * number, "an answer") for number in range(1, 7)]
    config = Config.model_validate({"name": "tiny", "base_model": str(tiny_base_folder)})
    model = get_peft_model(load_model(base, "float32", "none"), lora_config(config.train)).eval()
    reporter = StopAfter()
    whole, halved = (
        dev_task(config, tmp_path, open_chat(base), rows, rows, 512, each) for each in (reporter, reporter)
    )
    assert whole is not None
    assert halved is not None
    expected = whole.answers(model, range(6))
    run_out_of_memory(model, 2)
    assert halved.answers(model, range(6)) == expected
    assert len(reporter.warnings) == 4, "32 rows, 16, 8 and 4"
    assert halved.answers(model, range(6)) == expected
    assert len(reporter.warnings) == 4, "the next evaluation begins with 2 rows"
