"""``train --curve`` through the command line, on a tiny base; and what a curve is read as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from making.command_line import trained_project, tunewright
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.config import MetricName
from tunewright.evidence.common import Interval
from tunewright.evidence.learning_curve import Curve, Point, more_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, dict[str, Any], int, str]:
    """A project with its own adapter and a curve; what was printed, and how it ended."""
    project = trained_project(tmp_path_factory.mktemp("curve") / "project", tiny_base_folder)
    ran = tunewright("train", "--curve", "--seeds", "2", "--force", "--json", "-p", project)
    return project, ran.document, ran.code, ran.stderr


Curved = tuple[Path, dict[str, Any], int, str]


def test_curve_trains_each_seed_on_nested_parts(curved: Curved) -> None:
    project, document, _, _ = curved
    points = document["curve"]["points"]
    assert [(p["seed"], p["share"], p["rows"]) for p in points] == [
        (seed, share, rows) for seed in (0, 1) for share, rows in ((0.25, 24), (0.5, 48), (1.0, 96))
    ]
    (own,) = list_adapters(project / "adapters")
    stored = list_adapters(project / ".tunewright" / "curve" / "adapters")
    assert points[2]["adapter"] == own.digest
    assert {p["adapter"] for p in points} - {own.digest} == {a.digest for a in stored}
    message = {(a.lineage["curve"]["seed"], a.lineage["curve"]["share"]): a for a in stored}
    assert len(message) == 5
    for adapter in stored:
        assert adapter.lineage["dataset"]["splits"]["dev"] == own.lineage["dataset"]["splits"]["dev"]
        assert "24 training pairs in a 25% part of them" in adapter.lineage["forced"]
    assert message[0, 0.25].lineage["seed"] == 0 and message[1, 0.25].lineage["seed"] == 1


def test_curve_answers_by_the_fitted_lines_with_an_exit_code(curved: Curved) -> None:
    _, document, code, _ = curved
    curve = document["curve"]
    by_seed = [[p for p in curve["points"] if p["seed"] == seed] for seed in (0, 1)]
    lines = [np.polyfit(np.log2([p["rows"] for p in ps]), [p["score"] for p in ps], 1)[0] for ps in by_seed]
    assert curve["slope"] == pytest.approx(np.mean(lines), abs=1e-12)
    assert curve["interval"]["low"] <= curve["slope"] <= curve["interval"]["high"]
    assert code == {"yes": 0, "no": 3, "can't tell": 4}[document["more_data"]]
    assert document["reasons"][0].startswith("Would more data help? ")


def test_curve_scores_match_the_adapters_answers(curved: Curved, tiny_base_folder: Path) -> None:
    """Greedy decoding by transformers alone, for the adapter of the smallest part."""
    project, document, _, _ = curved
    point = document["curve"]["points"][0]
    stored = {a.digest: a for a in list_adapters(project / ".tunewright" / "curve" / "adapters")}
    answers, references = _plain_answers(tiny_base_folder, stored[point["adapter"]], project)
    assert point["score"] == np.mean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)])


def _plain_answers(base: Path, adapter: Adapter, project: Path) -> tuple[list[str], list[str]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunewright.data.versions import load_version

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.folder)
    dev = load_version(project / "dataset").examples("dev")
    answers = []
    for member in dev:
        ids: Any = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in member.example.prompt],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        answers.append(str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers, [m.example.output for m in dev]


def test_curve_reuses_a_finished_curve_and_draws_its_plot(curved: Curved) -> None:
    project, document, code, _ = curved
    again = tunewright("train", "--curve", "--seeds", "2", "--force", "-p", project)
    assert again.code == code
    assert "Loading" not in again.stderr
    assert document["reasons"][0] in again.stdout
    root = ElementTree.fromstring(Path(document["plot"]).read_text())
    text = "".join(root.itertext())
    assert "training rows" in text and "mean of 2 seeds" in text
    assert "var(" not in Path(document["plot"]).read_text()
    saved = json.loads((Path(document["folder"]) / "curve.json").read_text())
    assert saved == document["curve"]


def test_parts_below_fifty_pairs_are_refused_unless_forced(curved: Curved) -> None:
    project, _, _, _ = curved
    ran = tunewright("train", "--curve", "-p", project)
    assert (ran.code, "24 training pairs in a 25% part of them" in ran.stderr) == (2, True)


# Reading a curve


def _curve(
    slope: float, low: float, high: float, clusters: int = 40, metric: MetricName = "exact_match", margin: float = 0.02
) -> Curve:
    shares: Sequence[float] = (0.25, 0.5, 1.0)
    points = [
        Point(share=share, seed=seed, rows=int(400 * share), score=0.3 + slope * n, dev_loss=1.0, adapter="a")
        for seed in (0, 1, 2)
        for n, share in enumerate(shares)
    ]
    return Curve(
        id="c",
        project="p",
        metric=metric,
        margin=margin,
        items=60,
        clusters=clusters,
        shares=tuple(shares),
        seeds=(0, 1, 2),
        points=points,
        slope=slope,
        interval=Interval(low=low, high=high),
        method="",
        lineage={},
    )


@pytest.mark.parametrize(
    ("curve", "answer", "code", "words"),
    [
        (_curve(0.06, 0.02, 0.10), "yes", 0, "+6.0 points (95% interval +2.0 to +10.0)"),
        (_curve(0.03, 0.01, 0.05), "yes", 0, "Twice the rows would bring about as much again"),
        (_curve(0.01, 0.005, 0.015), "no", 3, "not more than the margin of 2 points"),
        (_curve(-0.05, -0.08, -0.02), "no", 3, "-5.0 points"),
        (_curve(0.03, -0.02, 0.08), "can't tell", 4, "the interval includes both no gain and more than 2 points"),
        (_curve(0.2, 0.1, 0.3, clusters=5), "can't tell", 4, "5 independent dev clusters are too few"),
    ],
)
def test_curve_answer_depends_on_the_interval(curve: Curve, answer: str, code: int, words: str) -> None:
    message = more_data(curve)
    assert (message.answer, message.exit_code) == (answer, code)
    assert words in message.reasons[0]
    assert "from 50% to all 400 rows" in message.reasons[1]
