"""The evidence on BANKING77, scored again from the frozen answers, and every figure of docs/benchmarks/banking77.md.

The answers are in tests/golden/banking77 (`python benchmarks/banking77.py freeze`), the customers' messages are not.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from making.command_line import tunewright
from making.evidence import pair
from making.real_data import SHARED
from tunewright.cli.data import leakage_blocks
from tunewright.cli.evaluate import verdict_text
from tunewright.config.io import load_config
from tunewright.config.project import CONFIG_FILE
from tunewright.data.dedup.leakage import LeakageRate, LeakageReport, NearestTrainingRow
from tunewright.data.dedup.output_leakage import OutputLeakage
from tunewright.data.versions import MANIFEST, Manifest, load_version
from tunewright.data.versions.version import version_table
from tunewright.evaluation.arms import plan_of
from tunewright.evidence.blocks import advice_section, evaluation_sections
from tunewright.evidence.files import load_evidence
from tunewright.evidence.schema import (
    Advice,
    Arm,
    Evidence,
)
from tunewright.evidence.scoring import ScoredArms, declared_contrasts, score_arm, score_arms, scores_by_distance
from tunewright.evidence.verdict import SIGNIFICANT, verdict
from tunewright.metrics import open_scorers
from tunewright.render.terminal import rendered

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "banking77"
PAGE = ROOT / "docs" / "benchmarks" / "banking77.md"
CONFIG = load_config(GOLDEN / CONFIG_FILE)
CHOOSING_RESAMPLES = 1_000  # as of the arms on dev


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("banking77", ROOT / "benchmarks" / "banking77.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


# Scored again


def _rows(name: str) -> list[dict[str, Any]]:
    text = gzip.decompress((GOLDEN / f"{name}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def _scored(rows: Sequence[dict[str, Any]]) -> ScoredArms:
    return score_arms(
        open_scorers(CONFIG.evaluate, GOLDEN),
        [pair(row["key"], row["reference"]) for row in rows],
        [row["cluster"] for row in rows],
        {name: [row["answers"][name][0] for row in rows] for name in rows[0]["answers"]},
    )


def _arms(rows: Sequence[dict[str, Any]], recorded: Sequence[Arm], resamples: int) -> list[Arm]:
    """The arms by the rows' answers; of the record which arms there were, and what their prompts share."""
    scored = _scored(rows)
    assert sorted(rows[0]["answers"]) == sorted(arm.name for arm in recorded)
    found = []
    for arm in recorded:
        _, truncated, prompts, answers = zip(*(row["answers"][arm.name] for row in rows), strict=True)
        measured = score_arm(
            name=arm.name,
            kind=arm.kind,
            shots=arm.shots,
            scores=scored.of_arm(arm.name),
            clusters=scored.clusters,
            truncated=sum(truncated),
            prompt_tokens=sum(prompts) / len(rows),
            seed=CONFIG.seed,
            resamples=resamples,
        )
        plan = asdict(plan_of(arm))
        written = sum(answers) / len(rows)
        found.append(measured.model_copy(update={**plan, "shared_tokens": arm.shared_tokens, "answer_tokens": written}))
    return found


@cache
def _recorded() -> Evidence:
    return load_evidence(GOLDEN)


@cache
def _evidence() -> Evidence:
    """Return the record with everything that follows from the answers computed again."""
    recorded, test, dev, first = _recorded(), _rows("test"), _rows("dev"), _rows("first")
    assert recorded.opening is not None and recorded.narrowing is not None
    scored = _scored(test)
    pairs = [(declared.treatment, declared.control) for declared in recorded.opening.declared]
    contrasts = declared_contrasts(scored, pairs, CONFIG.seed)
    on_first = _arms(first, recorded.narrowing.arms, CHOOSING_RESAMPLES)
    value = {arm.name: arm.score(recorded.metric).value for arm in on_first}
    draws = range(1, CONFIG.evaluate.static_seeds + 1)
    return recorded.model_copy(
        update={
            "items": len(test),
            "clusters": len({row["cluster"] for row in test}),
            "arms": _arms(test, recorded.arms, 10_000),
            "contrasts": contrasts,
            "train_similarity": scores_by_distance(scored, [row["nearest"] for row in test], contrasts[0], CONFIG.seed),
            "dev_arms": _arms(dev, recorded.dev_arms, CHOOSING_RESAMPLES),
            "narrowing": recorded.narrowing.model_copy(update={"items": len(first), "arms": on_first}),
            "static": tuple(
                each.model_copy(
                    update={
                        "items": len(first),
                        "scores": tuple(value[f"static-{each.shots}-seed-{seed}"] for seed in draws),
                    }
                )
                for each in recorded.static
            ),
        }
    )


@cache
def _advice() -> Advice:
    """The choice of the prompting arm as it was recorded."""
    return Advice.model_validate_json((GOLDEN / "advice.json").read_bytes())


@cache
def _advice_anew() -> Advice:
    """Return the same with the arms scored again, and the best of them."""
    evidence = _evidence()
    best = max(evidence.dev_arms, key=lambda arm: (arm.score(evidence.metric).value, -arm.shots))
    arms = {"arms": evidence.dev_arms, "narrowing": evidence.narrowing, "static": evidence.static}
    return _advice().model_copy(update={**arms, "best": best.name})


@cache
def _leak() -> LeakageReport:
    """Return the similarity report of held-out rows, with the shares of this split counted again."""
    (recorded,) = _rows("leak")
    nearest = tuple(NearestTrainingRow(**row) for row in recorded["nearest"])
    on_test = [row.similarity for row in nearest if row.split == "test"]
    leaks = [LeakageRate(**each) for each in recorded["leaks"]]
    counted = [replace(each, here=sum(s >= each.threshold for s in on_test) / len(on_test)) for each in leaks]
    outputs = OutputLeakage(test=295, outputs=77, templates=77, overlaps=(), natural="outputs are labels")
    return LeakageReport(recorded["version"], recorded["held_out"], nearest, tuple(counted), outputs)


def _differences(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Yield the places where two JSON values differ by more than rounding."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _differences(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, f"{place}[{number}]")
    elif isinstance(ours, float) and isinstance(theirs, float | int):
        if ours != pytest.approx(theirs, rel=1e-9, abs=1e-12):
            yield f"{place}: {ours} is not {theirs}"
    elif ours != theirs:
        yield f"{place}: {ours} is not {theirs}"


def test_evidence_equals_the_scores_of_the_frozen_answers() -> None:
    assert list(_differences(_evidence().model_dump(mode="json"), _recorded().model_dump(mode="json"))) == []


def test_prompting_arm_is_chosen_by_its_frozen_dev_answers() -> None:
    assert list(_differences(_advice_anew().model_dump(mode="json"), _advice().model_dump(mode="json"))) == []
    assert _evidence().best_prompting == _advice_anew().best


def test_leak_report_matches_the_similarities_in_the_evidence() -> None:
    (recorded,) = _rows("leak")
    assert list(_differences([asdict(each) for each in _leak().leaks], recorded["leaks"])) == []
    assert {row.key: row.similarity for row in _leak().nearest if row.split == "test"} == {
        row["key"]: row["nearest"] for row in _rows("test")
    }


def test_changed_answer_is_noticed() -> None:
    rows = _rows("test")
    name, wanted = "tuned", rows[0]["reference"]
    right = rows[0]["answers"][name][0] == wanted
    rows[0]["answers"][name][0] = "no intent" if right else wanted
    changed = _arms(rows, _recorded().arms, 10_000)
    differences = list(_differences([arm.model_dump() for arm in changed], [a.model_dump() for a in _recorded().arms]))
    assert any("scores.choices.value" in difference for difference in differences)


# What is frozen, and what is not


def test_frozen_answers_hold_no_query() -> None:
    for name in ("test", "dev", "first"):
        for row in _rows(name):
            assert row.keys() <= {"key", "cluster", "reference", "nearest", "answers"}
            texts = [row["reference"], *(answer[0] for answer in row["answers"].values())]
            assert all(len(text.split()) <= 1 for text in texts), row["key"]


@pytest.mark.slow
def test_part_of_the_published_files_is_the_measured_one(tmp_path: Path) -> None:
    """Its rows and splits come out the same, and no message is in a file of the project."""
    if not (SHARED / "banking77").is_dir():
        pytest.skip("the data set banking77 is not next to the project")
    project = tmp_path / "banking77"
    SCRIPT.make(SHARED / "banking77", project, SCRIPT.ROWS, CONFIG.seed)
    assert load_config(project / CONFIG_FILE) == CONFIG
    assert tunewright("data", "add", project / SCRIPT.PART, "-p", project).code == 0
    version = load_version(project / "dataset")
    assert version.digest == _recorded().lineage["dataset"]
    for split in ("test", "dev"):
        members = version.examples(split)
        frozen = [(row["key"], row["cluster"], row["reference"]) for row in _rows(split)]
        assert frozen == [(m.key, m.cluster, m.example.output) for m in members]
    kept = "".join(_rows_text()) + PAGE.read_text(encoding="utf-8")
    texts = {text for text, _ in SCRIPT.read_rows(SHARED / "banking77") if len(text.split()) > 2}
    assert [text for text in texts if text in kept] == []


def _rows_text() -> Iterator[str]:
    for file in sorted(GOLDEN.iterdir()):
        data = file.read_bytes()
        yield (gzip.decompress(data) if file.suffix == ".gz" else data).decode()


# The page


def _printed() -> list[str]:
    """Return the commands' output for the record, scored again."""
    evidence = _evidence()
    manifest = Manifest.model_validate_json((GOLDEN / MANIFEST).read_bytes())
    parts = rendered(
        version_table([manifest]),
        *leakage_blocks(_leak(), ()),
        advice_section(_advice_anew()),
        _training_text(evidence),
        *evaluation_sections(evidence),
        verdict_text(verdict(evidence)),
    )
    out = io.StringIO()
    console = Console(file=out, width=120, soft_wrap=True)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    return out.getvalue().splitlines()


def _training_text(evidence: Evidence) -> str:
    reported = evidence.lineage["adapter"]["lineage"]["training"]
    losses = ", ".join(f"{e['dev_loss']:.3f} ({e['dev_metric']:.1%})" for e in reported["epochs"])
    return f"{reported['examples']} examples; dev loss by evaluation {losses}; kept step {reported['kept_step']}"


def _page() -> tuple[str, list[str]]:
    """The prose with white space as single blanks, and the lines of the fenced blocks."""
    prose: list[str] = []
    blocks: list[str] = []
    fenced = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        else:
            (blocks if fenced else prose).append(line)
    return " ".join(" ".join(prose).split()), blocks


def test_page_quotes_the_commands_output() -> None:
    commands = [*(["tunewright", *words] for words in SCRIPT.ROAD.values()), *map(shlex.split, SCRIPT.USAGE)]
    printed = {line.rstrip() for line in _printed()}
    quoted = [line.rstrip() for line in _page()[1]]
    assert sum(line in printed for line in quoted) > 50
    reported = [line for line in quoted if line not in printed and line != "…"]
    assert [line for line in reported if shlex.split(line) not in commands] == []


def _percent(arm: Arm) -> str:
    return f"{100 * arm.score(_evidence().metric).value:.1f}%"


def _of_dev() -> list[str]:
    """Return the lines about the prompting arms."""
    evidence = _evidence()
    assert evidence.narrowing is not None
    first = {arm.name: arm for arm in evidence.narrowing.arms}
    score = {name: _percent(arm) for name, arm in first.items()}
    free, listed = first["retrieved-4-tfidf"], first["retrieved-4-tfidf-instruction-1+constrained"]
    held = "retrieved-4-tfidf+constrained"
    outside = free.score(evidence.metric).outside
    free_zero_shot = [arm for arm in first.values() if arm.kind == "zero-shot" and not arm.constrained]
    assert [arm.score(evidence.metric).outside for arm in free_zero_shot] == [len(_rows("first"))] * 2
    for kind in ("retrieved-{}-tfidf", "retrieved-{}-tfidf+constrained"):
        few, many = (first[kind.format(shots)].score(evidence.metric).value for shots in (4, 16))
        assert few > many
    return [
        f"reaches {score['zero-shot+constrained']}, and {score['zero-shot-instruction-1+constrained']} with the list",
        f"{score['retrieved-4']} by words and {score['retrieved-4-tfidf']} by characters",
        f"{outside} of {free.items} free answers are not an intent",
        f"with the constraint the score is {score[held]}",
        f"{score['retrieved-16-tfidf']} free, {score['retrieved-16-tfidf+constrained']} constrained",
        f"{listed.prompt_tokens:.0f} tokens instead of {free.prompt_tokens:.0f} and reaches {score[listed.name]}",
    ]


def _of_test() -> list[str]:
    """Return the lines about the test split."""
    evidence = _evidence()
    best, tuned, both = (evidence.arm(name) for name in (evidence.best_prompting, "tuned", "tuned+retrieved-4-tfidf"))
    ours, theirs = (arm.score(evidence.metric) for arm in (tuned, best))
    right, rivals = (round(score.value * score.scored) for score in (ours, theirs))
    zero_shot, with_examples = evidence.contrasts[1:]
    assert (zero_shot.control, with_examples.treatment) == ("zero-shot", both.name)
    assert with_examples.p_adjusted is not None and with_examples.p_adjusted >= SIGNIFICANT
    on_dev = next(arm for arm in evidence.dev_arms if arm.name == best.name)
    adapter_on_dev = evidence.lineage["adapter"]["lineage"]["training"]["epochs"][-1]["dev_metric"]
    assert verdict(evidence).exit_code == 4
    gain_on_dev = adapter_on_dev - on_dev.score(evidence.metric).value
    assert 0 < evidence.contrasts[0].difference < gain_on_dev / 2
    return [
        f"{right} of {tuned.items} right, the best prompt {rivals}",
        f"{tuned.prompt_tokens:.0f} prompt tokens where retrieval needs {best.prompt_tokens:.0f}",
        f"{ours.outside} of its answers are not an intent",
        f"it reaches {_percent(both)}; that contrast's adjusted p is {with_examples.p_adjusted:.2g}",
        f"gains {100 * zero_shot.difference:.1f} points",
        f"the prompt scored {_percent(on_dev)} and the adapter {adapter_on_dev:.1%}",
        "Exit code 4",
    ]


def _of_the_run() -> list[str]:
    """Return the lines about the part and its duration."""
    spent = json.loads((GOLDEN / "run.json").read_text(encoding="utf-8"))["cpu"]
    minutes = {name: f"{seconds / 60:.0f} minutes" for name, seconds in spent.items()}
    return [
        f"{SCRIPT.ROWS} rows of each intent",
        f"the prompting arms took {minutes['prompting arms']}, training {minutes['train']} and the rest of `evaluate` "
        f"{minutes['evaluate']}",
    ]


NAMES = (
    "BANKING77",
    "banking77",
    "2003.04807",
    "2020",
    "CC-BY-4.0",
    "all 77",
    "77 intents",
    "4 or 16",
    "16 similar examples",
    "BM25",
    "instruction-1",
)
"""What has digits and is no figure of the run."""


_FIGURE = re.compile(r"\d[\d.,]*\d%?|\d%?")


@pytest.mark.slow
def test_prose_figures_follow_from_the_record() -> None:
    """The prose has the record's figures and no others; the words around them may change."""
    prose, _ = _page()
    for name in NAMES:
        prose = prose.replace(name, "")
    reported = " ".join([*_of_the_run(), *_of_dev(), *_of_test()])
    assert sorted(_FIGURE.findall(prose)) == sorted(_FIGURE.findall(reported))
