"""The demo: an example project, the pipeline, and one held-out question answered three ways by a real server.

The example's quick settings keep it to a few minutes. The whole settings and slow measurements (a pilot for the advice,
a learning curve, a judge) only run on request.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx

from tunewright.api import Project
from tunewright.config import JudgeConfig, MetricName
from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter
from tunewright.data.versions import Member
from tunewright.evaluation.arms import TUNED
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.evidence.schema import Item
from tunewright.examples import legal_citations
from tunewright.pipeline import RunResult
from tunewright.serving.options import ServeOptions

if TYPE_CHECKING:
    from tunewright.advisor.advice import AdviceResult
    from tunewright.evaluation.judge.runner import JudgeResult
    from tunewright.evaluation.learning_curve import CurveResult


DEMO_FOLDER = "tunewright-demo"
"""The folder that `tunewright demo` makes, unless it is given another one."""
_REPLY = {"temperature": 0, "max_tokens": 64}
"""Token limit of the demo's judge: a verdict and a sentence."""


@dataclass(frozen=True)
class DemoAnswers:
    """One test item's question and the answers of the base, the adapter and the adapter's earlier checkpoint."""

    question: str
    reference: str
    answers: dict[str, str]
    best_prompting: str
    """The name of the best prompting arm."""
    prompted: str
    """Its answer in the evaluation: the base with demonstrations."""


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


def open_demo(directory: Path, reporter: Reporter, *, whole: bool = False, cluster: str | None = None) -> Project:
    """Return the demo project in ``directory``, created if it does not exist.

    With ``whole`` it gets the example's whole settings, also over unchanged quick ones.
    """
    config, name = directory / CONFIG_FILE, legal_citations.NAME
    if not config.exists():
        create_project(directory, legal_citations.project_files(quick=not whole))
        reporter.say(f"Wrote the example project {name} in {directory}")
    elif whole and config.read_text(encoding="utf-8") == legal_citations.project_files(quick=True)[CONFIG_FILE]:
        write_text(config, legal_citations.project_files()[CONFIG_FILE])
        reporter.say(f"Replaced the quick settings in {config} by the whole ones")
    return Project(ProjectFolder(directory).on_cluster(cluster), reporter)


def find_demo(folder: Path) -> Path:
    """Return the folder of the finished demo project: this one, or `DEMO_FOLDER` in it."""
    configs = {legal_citations.config_text(quick=quick) for quick in (True, False)}
    for place in (folder / DEMO_FOLDER, folder):
        config = place / CONFIG_FILE
        ours = config.is_file() and config.read_text(encoding="utf-8", errors="replace") in configs
        if ours and any(place.glob(f"evaluations/[!.]*/{EVIDENCE_FILE}")):
            return place
    fix = "Run `tunewright demo` first, which takes some minutes."
    raise UserError("There is no finished demo project", where=str(folder / DEMO_FOLDER), fix=fix)


@contextmanager
def copied_demo(folder: Path) -> Iterator[Path]:
    """Yield a temporary copy of the finished demo project, without caches and checkpoints of training.

    Pages write files too: a review draws its sample, a report is made when it is first read. All of that stays in the
    copy.
    """
    found = find_demo(folder)
    with TemporaryDirectory(prefix=f"{DEMO_FOLDER}-", ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary) / found.resolve().name
        shutil.copytree(found, copy, ignore=shutil.ignore_patterns(".tunewright"))
        yield copy


def choose_item(items: Sequence[Item], metric: MetricName) -> Item:
    """Return the test item to show: the one where the adapter gains most over all prompting arms.

    Of equal gains, that is the item least similar to any training row. An item whose reference is wrong rarely gains,
    because the adapter answers as the other rows do.
    """

    def gain(item: Item) -> float:
        scores = item.scores[metric]
        prompted = [score for arm, score in scores.items() if not arm.startswith(TUNED.name)]
        # A metric may be unable to score an item, which then shows nothing.
        return scores[TUNED.name] - max(prompted) if TUNED.name in scores and prompted else -1.0

    return min(items, key=lambda item: (-gain(item), item.nearest or 0.0, item.key))


def member_of(project: Project, item: Item) -> Member:
    """Return the dataset's row of a test item."""
    return next(member for member in project.data.version().examples("test") if member.key == item.key)


def ask_three_ways(project: Project, result: RunResult, item: Item) -> DemoAnswers:
    """Serve base, adapter and earliest checkpoint, and ask each of them a test item's question."""
    adapter = result.trained.adapter
    earlier = [f"{adapter.name}@{step}" for step in adapter.checkpoints][:1]
    member = member_of(project, item)
    service = project.serve([adapter.name, *earlier], ServeOptions(port=0))
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
    best = result.advised.advice.best
    return DemoAnswers(member.example.input_text, member.example.output, answers, best, item.answers[best])


def measure_slow_parts(project: Project, evaluation: Path) -> SlowMeasurements:
    """Return the report's other measurements of an evaluation (given by its folder), except human evaluation.

    The base serves as judge because it is always available. It is a poor judge, so its controls fail and it is vetoed.
    """
    advice, curve = project.advise(), project.curve()
    service = project.serve([], ServeOptions(port=0))
    with service.running() as url:
        judge = JudgeConfig(base_url=f"{url}/v1", model=project.base.spec, parameters=_REPLY)
        config = project.folder.config.model_copy(update={"judge": judge})
        judged = Project(ProjectFolder(project.folder.root, config), project.reporter).judge(evaluation)
    return SlowMeasurements(advice, curve, judged, project.report(evaluation))
