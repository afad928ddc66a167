"""The demo: an example project, the pipeline, and one held-out question answered three ways by a real server.

The example's quick settings keep it to a few minutes. The whole settings and slow measurements (a pilot for the advice,
a learning curve, a judge) only run on request. At the end two tenants on one base have access to their own alias only.
The second tenant's adapter is an earlier checkpoint: a different adapter that needs no training. It was never
evaluated, so its release is forced and the reason is stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx

from tunewright import examples
from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.lineage import system_prompt
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.config import JudgeConfig, MetricName
from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.errors import UserError, require_torch
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter
from tunewright.data.versions import Member
from tunewright.evaluation.arms import TUNED
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.evidence.schema import Item
from tunewright.pipeline import RunResult
from tunewright.serving.options import DeployOptions, ServeOptions

if TYPE_CHECKING:
    from tunewright.advisor.advice import AdviceResult
    from tunewright.evaluation.judge.runner import JudgeResult
    from tunewright.evaluation.learning_curve import CurveResult
    from tunewright.serving.tenants.releases import Release


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
    """The best prompting arm's answer in the evaluation: the base with demonstrations."""


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

    With ``whole`` it gets the example's whole settings, which also replace unchanged quick settings.
    """
    require_torch()
    config, name = directory / CONFIG_FILE, examples.LEGAL_CITATIONS
    if not config.exists():
        create_project(directory, examples.project_files(reporter, quick=not whole))
        reporter.say(f"Wrote the example project {name} in {directory}")
    elif whole and config.read_text(encoding="utf-8") == examples.config_text(quick=True):
        write_text(config, examples.config_text(quick=False))
        reporter.say(f"Replaced the quick settings in {config} by the whole ones")
    return Project(ProjectFolder(directory).on_cluster(cluster), reporter)


def find_demo(folder: Path) -> Path:
    """Return the folder of the finished demo project: this one, or `DEMO_FOLDER` in it."""
    configs = {examples.config_text(quick=quick) for quick in (True, False)}
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
    """Return the test item to show: the item where the adapter gains most over all prompting arms.

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
    body = _request(result, member)
    with service.running() as url, httpx.Client(base_url=url, timeout=120) as client:
        for model in [project.base.spec, *earlier, adapter.name]:
            reply = client.post("/v1/chat/completions", json={**body, "model": model}).raise_for_status()
            answers[model] = reply.json()["choices"][0]["message"]["content"]
    best = result.advised.advice.best
    return DemoAnswers(member.example.input_text, member.example.output, answers, best, item.answers[best])


def _request(result: RunResult, member: Member) -> dict[str, Any]:
    messages = [message.as_dict() for message in member.example.prompt]
    return {"messages": messages, "max_tokens": result.advised.advice.max_new_tokens}


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


STATE = "two-tenants.sqlite"
"""A separate serving state, so that `tunewright serve` in the demo's folder still answers without a key."""
TENANTS = {"acme": "legal", "globex": "legal-draft"}
"""The alias of each tenant."""
_NOBODYS = "nobodys"
_KEY_SECONDS = 3600.0


@dataclass(frozen=True)
class TenantVisit:
    """Responses of the server to one tenant's key."""

    tenant: str
    alias: str
    adapter: str
    sees: tuple[str, ...]
    """The models that the server lists for the tenant."""
    answer: str
    answered_by: str
    """The adapter digest returned with the answer."""
    others_alias: int
    """The HTTP status for the other tenant's alias."""
    same_refusal: bool
    """True if that refusal equals the one for an alias that does not exist, except for the name."""
    requests: int
    tokens: int


@dataclass(frozen=True)
class TwoTenants:
    """Two tenants on one server."""

    question: str
    reference: str
    visits: tuple[TenantVisit, ...]
    releases: tuple[Release, ...]
    """The live releases."""
    state: str
    """The URL of the serving state, for inspection."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "question": self.question,
            "reference": self.reference,
            "tenants": [asdict(visit) for visit in self.visits],
            "releases": [release.as_dict() for release in self.releases],
            "state": self.state,
        }


def show_two_tenants(opened: Project, result: RunResult, member: Member) -> TwoTenants | None:
    """Release two adapters for two tenants, and ask one row's question as each.

    It returns None with a warning if there is no checkpoint or a release is refused.
    """
    from tunewright.serving.tenants import State

    trained, project = result.trained.adapter, opened.folder
    if not trained.checkpoints:
        opened.reporter.warn(f"{trained.name} has no earlier checkpoint, which would be the second tenant's adapter.")
        return None
    step, folder = next(iter(trained.checkpoints.items()))
    state = f"sqlite:///{(project.serving_state.parent / STATE).resolve()}"
    State(state).close()  # created here, since a state named by URL must exist
    serve = project.config.serve.model_copy(update={"database_url": state})
    own = Project(ProjectFolder(project.root, project.config.model_copy(update={"serve": serve})), opened.reporter)
    name, prompt = f"{project.config.name}-{step}", system_prompt(trained, project.dataset).text
    draft = own.adapters.import_(folder, ImportOptions(base_matches=True, name=name, system_prompt=prompt)).adapter
    decision = result.verdict.decision
    wanted = {
        "legal": (trained, None if decision == "ship" else f"for the demo, though its verdict is {decision}"),
        "legal-draft": (draft, f"for the demo: {trained.name} at {step.replace('-', ' ')}, not evaluated"),
    }
    for alias, (adapter, because) in wanted.items():
        if not _release(own, alias, adapter, because):
            return None
    return _visit(own, result, member, {alias: adapter.name for alias, (adapter, _) in wanted.items()})


def _release(opened: Project, alias: str, adapter: Adapter, because: str | None) -> bool:
    """Release an adapter for an alias unless it is live already; return whether it is live."""
    if any(release.alias == alias and release.digest == adapter.digest for release in _live(opened)):
        return True
    opened.reporter.say(f"deploy {alias} {adapter.name}{'' if because is None else f': forced, {because}'}")
    done = opened.deploy(alias, adapter.name, DeployOptions(because=because))
    checked = done.serving or done.isolation
    if done.release is None and checked is not None:
        opened.reporter.warn(f"{alias} does not go live: {'; '.join(checked.reasons)}")
    return done.release is not None


def _live(opened: Project) -> list[Release]:
    """Return the current release of each live alias."""
    last = {release.alias: release for release in opened.releases()}
    return [release for release in last.values() if not release.undeployed]


def _visit(opened: Project, result: RunResult, member: Member, adapters: Mapping[str, str]) -> TwoTenants:
    """Serve, ask as each tenant with a key that is valid for an hour, and read their usage."""
    with opened.state() as state:
        known = {tenant.name for tenant in state.tenants.list()}
        for tenant, alias in TENANTS.items():
            if tenant not in known:
                state.tenants.add(tenant, [alias])
        keys = {tenant: state.keys.create(tenant, lifetime=_KEY_SECONDS).secret for tenant in TENANTS}
    body = _request(result, member)
    seen = {}
    with opened.serve(options=ServeOptions(port=0)).running() as url:
        for tenant, alias in TENANTS.items():
            headers = {"Authorization": f"Bearer {keys[tenant]}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
                seen[tenant] = _ask(client, alias, body)
    visits = []
    with opened.state() as state:
        for tenant, alias in TENANTS.items():
            used = state.usage.sums(tenant)
            tokens = sum(each.prompt_tokens + each.completion_tokens for each in used)
            requests = sum(each.requests for each in used)
            visits.append(TenantVisit(tenant, alias, adapters[alias], requests=requests, tokens=tokens, **seen[tenant]))
    database = opened.folder.config.serve.database_url
    assert database is not None
    return TwoTenants(member.example.input_text, member.example.output, tuple(visits), tuple(_live(opened)), database)


def _ask(client: httpx.Client, alias: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tenant's responses for its own alias, the other tenant's, and an alias that does not exist."""
    (other,) = set(TENANTS.values()) - {alias}
    listed = client.get("/v1/models").raise_for_status().json()["data"]
    own, others, nobodys = (
        client.post("/v1/chat/completions", json={**body, "model": model}) for model in (alias, other, _NOBODYS)
    )
    own.raise_for_status()
    return {
        "sees": tuple(model["id"] for model in listed),
        "answer": own.json()["choices"][0]["message"]["content"],
        "answered_by": own.headers["x-tunewright-adapter"],
        "others_alias": others.status_code,
        # Replace only the first match: the requested model comes first, and the tenant's own alias may contain its
        # name.
        "same_refusal": others.text.replace(other, "", 1) == nobodys.text.replace(_NOBODYS, "", 1),
    }
