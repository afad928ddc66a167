"""Choice of the best prompting arm on dev: narrowing after the first items, and its report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import tunewright
from making.command_line import tiny_project, write_jsonl
from making.command_line import tunewright as command
from making.versions import version_of
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.data.versions import Member
from tunewright.evaluation.generations import ArmAnswer, ArmPrompts, Generator
from tunewright.evaluation.prompt_search import first_items

# The first items


def test_first_items_are_spread_over_clusters_by_size() -> None:
    members = version_of([40, 20, 20, *[1] * 20]).members
    taken = first_items(members, 25, seed=0)
    assert len(set(taken)) == 25
    counts = Counter(members[place].cluster for place in taken)
    sizes = Counter(m.cluster for m in members)
    assert all(abs(counts[name] - size / 4) < 1 for name, size in sizes.items())
    assert taken == first_items(members, 25, seed=0) != first_items(members, 25, seed=1)


def test_first_items_are_a_uniform_sample() -> None:
    members = version_of([5, 3, 1, 1]).members
    times = Counter(place for seed in range(2000) for place in first_items(members, 4, seed))
    assert all(700 < times[place] < 900 for place in range(10))  # 800 expected each, standard deviation 22


# The choice, with answers that are made up


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Project:
    """A project with 60 dev items."""
    folder = tiny_project(tmp_path / "project", tiny_base_folder, count=150)
    config = folder / "tunewright.yaml"
    config.write_text(
        config.read_text().replace("  sources: [pairs.jsonl]", "  sources: [pairs.jsonl]\n  val_size: 0.4")
    )
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project


def answering(monkeypatch: pytest.MonkeyPatch, project: Project, right: dict[str, float]) -> list[tuple[str, int]]:
    """From now on arms answer right in these shares; returns the list that gets each arm's name and items."""
    asked: list[tuple[str, int]] = []
    questions = {project.chat.prompt(m.example.prompt)[-20:]: m for m in project.data.version().members}

    def answer(arm: ArmPrompts) -> list[ArmAnswer]:
        name = arm.title.split(" on ")[0]
        asked.append((name, len(arm.prompts)))
        members = [questions[prompt[-20:]] for prompt in arm.prompts]
        texts = [m.example.output if _seeded_order(m) < right.get(name, 0.0) else "no" for m in members]
        return [ArmAnswer(text, False, prompt, len(text)) for text, prompt in zip(texts, arm.prompts, strict=True)]

    monkeypatch.setattr(Generator, "answer_arms", lambda _self, arms, _limit: [answer(arm) for arm in arms])
    return asked


def _seeded_order(member: Member) -> float:
    return int(member.key[:8], 16) / 16**8


def settings(project: Project, text: str, shots: str = "[1, 2]") -> Project:
    """The project again with these keys in its evaluate section."""
    config = project.folder.root / "tunewright.yaml"
    config.write_text(config.read_text().replace("  num_fewshot: [1, 2]\n", f"  num_fewshot: {shots}\n{text}"))
    return tunewright.open(project.folder.root)


def test_narrowing_keeps_arms_not_shown_to_be_worse(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project = settings(project, "  screening_items: 30\n")
    right = {"retrieved-2": 0.9, "retrieved-1": 0.85, "retrieved-2-tfidf": 0.2, "static-2-seed-2": 0.8}
    asked = answering(monkeypatch, project, right)
    advice = project.prompting().advice
    narrowing = advice.narrowing
    assert narrowing is not None
    assert set(narrowing.finalists) == {"zero-shot", "retrieved-1", "retrieved-2", "static-2-seed-2"}
    assert [name for name, items in asked if items == 60] == list(narrowing.finalists)
    assert Counter(items for _, items in asked) == {30: 11, 60: 4}
    assert "points against retrieved-2, 95% interval" in narrowing.fates["retrieved-2-tfidf"]
    assert narrowing.fates["static-2-seed-1"] == "static-2-seed-2 is the best of its draws"
    assert set(narrowing.fates) | set(narrowing.finalists) == {arm.name for arm in narrowing.arms}
    assert (advice.best, advice.best_retrieved, advice.items) == ("retrieved-2", "retrieved-2", 60)


def test_static_draws_are_reported_with_their_mean(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, project, {"static-2-seed-1": 0.3, "static-2-seed-2": 0.9, "static-2-seed-3": 0.6})
    advice = project.prompting().advice
    assert advice.narrowing is None  # 60 dev items are fewer than first_items
    by_name = {arm.name: arm for arm in advice.arms}
    spread = advice.static[1]
    scores = [by_name[f"static-2-seed-{seed}"].score("exact_match").value for seed in (1, 2, 3)]
    assert (spread.name, spread.scores) == ("static-2", tuple(scores))
    assert spread.mean == pytest.approx(sum(scores) / 3)
    assert (advice.best, by_name[advice.best].seed) == ("static-2-seed-2", 2)


def test_narrowing_keeps_at_most_the_finalists_and_prefers_cheap_arms(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = settings(project, "  screening_items: 30\n  finalists: 1\n")
    answering(monkeypatch, project, {"retrieved-1": 0.5, "retrieved-2": 0.5, "retrieved-1-tfidf": 0.5})
    advice = project.prompting().advice
    assert advice.narrowing is not None
    assert advice.narrowing.finalists == ("zero-shot", "retrieved-1")
    assert "not among the best 1" in advice.narrowing.fates["retrieved-2"]


def test_every_arm_answers_all_of_dev_without_first_items(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project = settings(project, "  screening_items: null\n")
    asked = answering(monkeypatch, project, {})
    advice = project.prompting().advice
    assert (advice.narrowing, len(advice.arms)) == (None, 11)
    assert {items for _, items in asked} == {60}
    assert advice.best == "zero-shot"  # all are equally bad, and it is the cheapest


def test_prompt_search_tries_instructions_zero_shot_and_with_best_demonstrations(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = settings(project, '  instructions: ["Copy the first word.", "First word:"]\n')
    right = {"retrieved-2": 0.5, "retrieved-2-instruction-2": 0.9}
    asked = answering(monkeypatch, project, right)
    advice = project.prompting().advice
    instructed = [name for name, _ in asked if "instruction" in name]
    assert instructed == [
        "zero-shot-instruction-1",
        "zero-shot-instruction-2",
        "retrieved-2-instruction-1",
        "retrieved-2-instruction-2",
    ]
    assert advice.best == "retrieved-2-instruction-2"


# What goes into the prompts, through the command line


def test_arm_that_does_not_fit_is_left_out_by_name(project: Project) -> None:
    project = settings(project, "  static_seeds: 1\n  retrievers: [bm25]\n", shots="[1, 60]")
    ran = command("advise", "--no-pilot", "-p", project.folder.root, "--json")
    assert ran.code in {3, 4}, ran.stderr
    left_out = {arm["name"]: arm["why"] for arm in ran.document["advice"]["prompting"]["left_out"]}
    assert set(left_out) == {"static-60-seed-1", "retrieved-60"}
    assert "do not fit the base's context of 2,048 tokens" in left_out["retrieved-60"]


def test_shared_prompt_tokens_are_counted(project: Project) -> None:
    project = settings(project, "  static_seeds: 1\n  retrievers: [bm25]\n")
    arms = {arm.name: arm for arm in project.prompting().advice.arms}
    version, chat = project.data.version(), project.chat
    prompts = [chat.prompt(m.example.prompt) for m in version.examples("dev")]
    shared = next(n for n in range(len(prompts[0])) if len({p[: n + 1] for p in prompts}) > 1)
    assert arms["zero-shot"].shared_tokens == shared
    # Static demonstrations are the same for every question, retrieved ones are not.
    grown = arms["static-2-seed-1"].prompt_tokens - arms["zero-shot"].prompt_tokens
    assert arms["static-2-seed-1"].shared_tokens == pytest.approx(shared + grown)
    assert arms["retrieved-2"].shared_tokens < shared + 5


def test_prompt_search_refuses_instructions_without_a_place_before_measuring(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    turns = [
        [{"role": "system", "content": f"Serve {n % 2}."}, {"role": "user", "content": f"{n * 7919 % 10007} q"}]
        for n in range(120)
    ]
    write_jsonl(folder / "pairs.jsonl", [{"messages": [*t, {"role": "assistant", "content": "a"}]} for t in turns])
    config = folder / "tunewright.yaml"
    config.write_text(
        config.read_text().replace("  num_fewshot: [1, 2]\n", "  num_fewshot: [1, 2]\n  instructions: [Do it.]\n")
    )
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    with pytest.raises(UserError, match="2 different system turns"):
        project.prompting()
    assert not (folder / "evaluations").exists()
