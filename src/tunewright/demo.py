"""The demo: an example project, the pipeline, and one held-out question answered three ways by a real server.

Slow measurements (a pilot for the advice, a learning curve, a judge) only run on request.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tunewright.api import Project, RunResult
from tunewright.config import JudgeConfig
from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.examples import legal_citations

if TYPE_CHECKING:
    from tunewright.advisor.result import AdviceResult
    from tunewright.evaluation.judge.runner import JudgeResult
    from tunewright.evaluation.learning_curve import CurveResult


_REPLY = {"temperature": 0, "max_tokens": 64}
"""Token limit of the demo's judge: a verdict and a sentence."""


@dataclass(frozen=True)
class DemoAnswers:
    """One test item's question and the answers of the base, the adapter and the adapter's earlier checkpoint."""

    question: str
    reference: str
    answers: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the answers as ``--json`` prints them."""
        return asdict(self)


@dataclass(frozen=True)
class SlowMeasurements:
    """Slow measurements that the demo leaves out by default, as shown in the report."""

    advice: AdviceResult
    curve: CurveResult
    judged: JudgeResult
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Return advice, curve and judge as ``--json`` prints them."""
        return {
            "advised": self.advice.as_dict(),
            "curve": self.curve.curve.model_dump(mode="json"),
            "judge": self.judged.judgement.model_dump(mode="json"),
            "report": str(self.report),
        }


def example_files(name: str) -> dict[str, str]:
    """Return the files of the example project called ``name``.

    Raises:
        UserError: no such example.
    """
    if name != legal_citations.NAME:
        raise UserError(f"Unknown example {name!r}", where="--example", fix=f"Use {legal_citations.NAME}.")
    return legal_citations.project_files()


def open_demo(directory: Path, reporter: Reporter) -> Project:
    """Return the demo project in ``directory``, created if it does not exist."""
    if not (directory / CONFIG_FILE).exists():
        create_project(directory, example_files(legal_citations.NAME))
        reporter.say(f"Wrote the example project {legal_citations.NAME} in {directory}")
    return Project(ProjectFolder(directory), reporter)


def ask_three_ways(project: Project, result: RunResult) -> DemoAnswers:
    """Serve base, adapter and earliest checkpoint, and ask each of them the first question of the test split."""
    adapter = result.trained.adapter
    earlier = [f"{adapter.name}@{step}" for step in adapter.checkpoints][:1]
    member = project.data.version().examples("test")[0]
    service = project.serve([adapter.name, *earlier], port=0)
    answers = {}
    with service.running() as url, httpx.Client(base_url=url, timeout=120) as client:
        for model in [project.base.spec, *earlier, adapter.name]:
            reply = client.post(
                "/v1/chat/completions",
                json={
                    "model": model,
                    "messages": [m.as_dict() for m in member.example.prompt],
                    "max_tokens": result.advised.advice.max_new_tokens,
                },
            )
            reply.raise_for_status()
            answers[model] = reply.json()["choices"][0]["message"]["content"]
    return DemoAnswers(member.example.input_text, member.example.output, answers)


def measure_slow_parts(project: Project, evaluation: Path) -> SlowMeasurements:
    """Return the report's other measurements of an evaluation (given by its folder), except human evaluation.

    The base serves as judge because it is always available. It is a poor judge, so its controls fail and it is vetoed.
    """
    advice, curve = project.advise(), project.curve()
    service = project.serve([], port=0)
    with service.running() as url:
        judge = JudgeConfig(base_url=f"{url}/v1", model=project.base.spec, parameters=_REPLY)
        config = project.folder.config.model_copy(update={"judge": judge})
        judged = Project(ProjectFolder(project.folder.root, config), project.reporter).judge(evaluation)
    return SlowMeasurements(advice, curve, judged, project.report(evaluation))
