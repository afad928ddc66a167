"""The bundled base, trained for too few steps: the command line says that this is why not to ship."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from command_line import Ran, tunewright

pytestmark = [pytest.mark.slow, pytest.mark.release]

CONFIG = """\
name: too-short
base_model: bundled:smollm2-135m-instruct
data:
  sources: [pairs.jsonl]
  system_prompt: Give the citation abbreviation of this court.
  val_size: 0.1
  test_size: 0.2
train: {preset: all-linear, learning_rate: 0.0003, epochs: 1, batch_size: 8}
evaluate: {num_fewshot: [2], static_seeds: 0, retrievers: [bm25], tuned_retrieved: false, margin: 0.5}
regressions: {samples: 0}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A project of 150 courts after the whole pipeline, and its output."""
    folder = tmp_path_factory.mktemp("undertrained") / "project"
    assert tunewright("init", "--example", "legal-citations", folder).code == 0
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    random.Random(1).shuffle(rows)
    (folder / "pairs.jsonl").write_text("\n".join(rows[:150]) + "\n")
    (folder / "tunewright.yaml").write_text(CONFIG)
    return folder, tunewright("run", "--project", folder, "--json")


def test_run_reports_undertraining_and_the_fix(ran: tuple[Path, Ran]) -> None:
    _, done = ran
    assert done.code == 3, done.stderr
    cause = done.document["verdict"]["causes"][0]
    assert cause["what"].startswith("Hardly trained: 1")  # 13 or 14 steps
    assert cause["next"].startswith("Set train.epochs: 3 (now 1) or raise train.learning_rate, then `tunewright train`")
    # Training says it at its end, and nothing predicts the opposite.
    assert cause["what"] in done.stderr
    assert "Overfitting" not in done.stderr


def test_verdict_and_report_agree_on_the_cause(ran: tuple[Path, Ran]) -> None:
    folder, done = ran
    cause = done.document["verdict"]["causes"][0]
    message = tunewright("verdict", "--project", folder)
    assert message.code == 3
    assert f"{cause['what']}: {cause['evidence']}. Next: {cause['next']}." in f"{message.stdout}{message.stderr}"
    assert tunewright("verdict", "--project", folder, "--json").document["causes"] == done.document["verdict"]["causes"]
    assert cause["what"] in Path(done.document["report"]).read_text()
    assert "Hardly trained" in tunewright("verdict", "--markdown", "--project", folder).stdout
