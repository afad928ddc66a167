"""Arms that are constrained by a grammar, and the noise floor, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.command_line import COLOURS, Ran, tiny_project, tunewright, write_jsonl
from tunewright.config import ConstrainConfig, EvaluateConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import noise_floor
from tunewright.evaluation.arms import prompting_arms
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.prompt_search import warn_of_unreachable
from tunewright.evidence.files import load_items
from tunewright.generation.constraints import Grammar
from tunewright.metrics import scorer_of
from tunewright.models.bases import resolve_base

CHOICES = COLOURS[:-1]  # one of the references' colours is no choice


def _constrain(folder: Path, constraint: str) -> None:
    """Hold the project's answers to this, and make it a short one."""
    file = folder / "tunewright.yaml"
    config = file.read_text().replace("epochs: 2", "epochs: 1")
    assert "  num_fewshot: [1, 2]\n" in config
    held = "  num_fewshot: [1]\n  static_seeds: 0\n  retrievers: [bm25]\n  max_new_tokens: 12\n"
    held += f"  structured_outputs: {constraint}\n"
    file.write_text(config.replace("  num_fewshot: [1, 2]\n", held))


def _files(folder: Path) -> list[Path]:
    """All but the working folder's own two, which say what is known of the base."""
    known = {".gitignore", "digests.json"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in known)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, Ran, Ran]:
    """A project that has been evaluated, and what advise and evaluate printed."""
    folder = tiny_project(tmp_path_factory.mktemp("held") / "project", tiny_base_folder, count=90)
    _constrain(folder, f"{{choices: {json.dumps(CHOICES)}}}")
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    advised = tunewright("advise", "-p", folder, "--json")
    assert advised.code in {0, 3, 4}, advised.stderr
    assert tunewright("train", "-p", folder).code == 0
    reported = tunewright("evaluate", "-p", folder, "--json")
    assert reported.code == 0, reported.stderr
    return folder, advised, reported


def test_each_prompting_arm_has_a_constrained_one() -> None:
    plans = prompting_arms(EvaluateConfig(num_fewshot=(2, 1), structured_outputs=ConstrainConfig(choices=("a",))))
    held = [plan.name for plan in plans if plan.constrained]
    names = ["zero-shot", "retrieved-1", "retrieved-2", "retrieved-1-tfidf", "retrieved-2-tfidf"]
    assert held == [f"{name}+constrained" for name in names]
    free = [plan for plan in plans if not plan.constrained]
    assert free == prompting_arms(EvaluateConfig(num_fewshot=(2, 1)))


def test_constrained_answers_are_choices_and_free_answers_are_not(evaluated: tuple[Path, Ran, Ran]) -> None:
    _, advised, reported = evaluated
    prompting = advised.document["advice"]["prompting"]
    names = {arm["name"] for arm in prompting["arms"]}
    # A constrained prompt is compared with a constrained pilot.
    assert prompting["best"].endswith("+constrained")
    assert advised.document["advice"]["gain"]["parts"][-1]["score"]["value"] > 0
    assert {"zero-shot", "zero-shot+constrained", "retrieved-1", "retrieved-1+constrained"} <= names
    items = load_items(Path(reported.document["folder"]))
    assert all(item.answers["tuned+constrained"] in CHOICES for item in items)
    assert not all(item.answers["zero-shot"] in CHOICES for item in items)
    (first, *_) = reported.document["evidence"]["contrasts"]
    assert first["treatment"] == "tuned"
    held = {arm["name"] for arm in reported.document["evidence"]["arms"] if arm["constrained"]}
    assert "tuned+constrained" in held


def test_references_outside_the_choices_are_reported_with_their_number(evaluated: tuple[Path, Ran, Ran]) -> None:
    folder, advised, _ = evaluated
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    missing = sum(row["completion"] == COLOURS[-1] for row in rows)
    assert (
        f"evaluate.structured_outputs: {missing} of {len(rows)} references do not match the grammar" in advised.stderr
    )
    assert COLOURS[-1] in advised.stderr


def test_evaluate_refuses_a_grammar_that_no_reference_matches(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder, count=60)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    _constrain(folder, "{regex: '[0-9]+'}")
    before = _files(folder)
    reported = tunewright("advise", "-p", folder)
    assert reported.code == 2
    assert "60 of 60 references do not match the grammar" in reported.stderr
    assert _files(folder) == before


@pytest.mark.parametrize("bad", ["{}", "{choices: [a], regex: b}", "{choices: []}", "{choice: [a]}"])
def test_structured_outputs_accepts_exactly_one_constraint(tmp_path: Path, bad: str) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [])
    (tmp_path / "tunewright.yaml").write_text(f"evaluate:\n  structured_outputs: {bad}\n")
    reported = tunewright("config", "show", "-p", tmp_path)
    assert reported.code == 2
    assert "tunewright.yaml:2" in reported.stderr


def test_noise_floor_is_in_the_evidence_and_zero_in_float32(evaluated: tuple[Path, Ran, Ran]) -> None:
    folder, _, reported = evaluated
    noise = reported.document["evidence"]["noise_floor"]
    assert (noise["items"], noise["changed"], noise["score_difference"]) == (9, 0, 0.0)
    again = tunewright("evaluate", "-p", folder)
    assert "Noise floor: 0 of 9 answers changed" in again.stderr + again.stdout


def _member(number: int, answer: str = "x") -> Member:
    messages = (Message("user", f"word {number}"), Message("assistant", answer))
    return Member(Example(messages), f"{number:064x}", "test", str(number))


@pytest.fixture
def generator(tiny_base_folder: Path, tmp_path: Path) -> Generator:
    """Free answers of a tiny base."""
    from tunewright.chat import open_chat

    base = resolve_base(str(tiny_base_folder), None, tmp_path, LogReporter())
    return Generator(base, open_chat(base), "float32", "none", 4, tmp_path, LogReporter(), stop=("END",))


def test_changed_answers_are_counted_past_the_journal(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [_member(number) for number in range(120)]
    prompts = [generator.chat.prompt(member.example.prompt) for member in members]
    generate, sizes = generator.generate, list[int]()

    def drifting(requests: Any, on_finished: Any, *, at_once: int, company: str) -> Any:
        """The second time, what the first request was asked is answered otherwise."""
        sizes.append(at_once)
        completions = generate(requests, on_finished, at_once=at_once, company=company)
        if len(sizes) == 2:
            (place,) = [n for n, r in enumerate(requests) if r.prompt_ids == first[0].prompt_ids]
            completions[place] = type(completions[place])((65, 65), "stop")
        first.extend(requests)
        return completions

    first: list[Any] = []
    monkeypatch.setattr(generator, "generate", drifting)
    noise = noise_floor(
        generator, members, prompts, 2, scorer_of(EvaluateConfig().metrics[0], generator.folder), seed=0
    )
    assert (noise.items, noise.changed) == (100, 1)
    assert sizes == [4, 2]
    assert [r.prompt_ids for r in first[:100]] != [r.prompt_ids for r in first[100:]]
    assert sorted(r.prompt_ids for r in first[:100]) == sorted(r.prompt_ids for r in first[100:])
    assert not generator.folder.exists()


def test_noise_floor_answers_equal_prompts_once(generator: Generator) -> None:
    members = [_member(number % 3, f"reference {number}") for number in range(12)]
    prompts = [generator.chat.prompt(member.example.prompt) for member in members]
    noise = noise_floor(generator, members, prompts, 2, scorer_of("exact_match", generator.folder), seed=0)
    assert noise.items == 3
    assert "batches of 3, then of 2" in noise.how


class _Heard(LogReporter):
    """A reporter whose warnings are kept."""

    def __init__(self, reported: list[str]) -> None:
        super().__init__()
        self._told = reported

    def warn(self, message: str) -> None:
        self._told.append(message)


def test_references_with_a_stop_string_are_named(generator: Generator) -> None:
    reported: list[str] = []
    reporter = _Heard(reported)
    members = [_member(1), _member(2, "before END after"), _member(3)]
    warn_of_unreachable(generator, members, reporter)
    assert len(reported) == 1
    assert reported[0].startswith("evaluate.stop: 1 of 3 references hold a stop string")
    assert members[1].key[:12] in reported[0]
    held = Generator(
        generator.base, generator.chat, "float32", "none", 4, generator.folder, reporter, grammar=Grammar('"y"')
    )
    with pytest.raises(UserError, match="3 of 3 references do not match"):
        warn_of_unreachable(held, members, reporter)
