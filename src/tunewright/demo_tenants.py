"""The end of the demo: two tenants on one base, each with access to its own alias only.

The second tenant's adapter is an earlier checkpoint: a different adapter that needs no training. It was never
evaluated, so its release is forced and the reason is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import httpx

from tunewright.adapters.import_options import ImportOptions
from tunewright.adapters.lineage import system_prompt
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.data.versions import Member
from tunewright.pipeline import RunResult
from tunewright.serving.options import DeployOptions, ServeOptions

if TYPE_CHECKING:
    from tunewright.serving.tenants import Release

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
    if done.release is None and done.serving is not None:
        opened.reporter.warn(f"{alias} does not go live: {'; '.join(done.serving.reasons)}")
    elif done.release is None and done.isolation is not None:
        opened.reporter.warn(f"{alias} does not go live: {'; '.join(done.isolation.reasons)}")
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
    messages = [message.as_dict() for message in member.example.prompt]
    body = {"messages": messages, "max_tokens": result.advised.advice.max_new_tokens}
    seen = {}
    with opened.serve(options=ServeOptions(port=0)).running() as url:
        for tenant, alias in TENANTS.items():
            headers = {"Authorization": f"Bearer {keys[tenant]}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
                seen[tenant] = _ask(client, alias, body)
    with opened.state() as state:
        usage = {tenant: state.usage.sums(tenant) for tenant in TENANTS}
    visits = []
    for tenant, alias in TENANTS.items():
        used = usage[tenant]
        tokens = sum(each.prompt_tokens + each.completion_tokens for each in used)
        requests = sum(each.requests for each in used)
        visits.append(TenantVisit(tenant, alias, adapters[alias], requests=requests, tokens=tokens, **seen[tenant]))
    database = opened.folder.config.serve.database_url
    assert database is not None
    return TwoTenants(member.example.input_text, member.example.output, tuple(visits), tuple(_live(opened)), database)


def _ask(client: httpx.Client, alias: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tenant's responses for its own alias, the other tenant's, and one that does not exist."""
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
