"""Notes on finished releases and running servers, from their jobs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tunewright.studio.jobs import SERVER, Job

_READY = re.compile(
    r"^Serving at (\S+)/v1\n((?:  .+\n)*)(?:\n?Prometheus metrics: (\S+)$)?",
    re.MULTILINE,
)
_ANSWER_S = 1.0  # on this machine; other pages wait meanwhile
_REPLICA = "tunewright_replica_"
_WANTED = "tunewright_wanted_replicas"
_BEGINNING = 100_000  # characters of a log; the address comes right after loading
RELEASES = ("deploy", "promote")
_OUTCOMES = {0: "done", 3: "refused", 4: "undecided"}


@dataclass(frozen=True)
class Served:
    """A running server's address and models."""

    url: str
    """Empty where no server is running."""
    models: tuple[str, ...]
    """Names that requests may ask for; empty if there are tenants and no alias is live."""
    metrics: str | None = None
    """The address of its metrics; None without them."""

    def curl(self, *, key: bool) -> str:
        """Return a command that asks the last of the models; ``key``: with a tenant's API key from the environment."""
        body = {"model": self.models[-1], "messages": [{"role": "user", "content": "Hello"}]}
        authorization = ' -H "Authorization: Bearer $TUNEWRIGHT_API_KEY"' if key else ""
        text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
        return f"curl {self.url}/v1/chat/completions{authorization} -H 'Content-Type: application/json' -d '{text}'"


def served(job: Job) -> Served | None:
    """Return the address of a server; None while it loads and after it has ended."""
    if job.command[0] != SERVER or job.state != "running":
        return None
    with job.log.open(encoding="utf-8", errors="replace") as log:
        ready = _READY.search(log.read(_BEGINNING))
    return Served(ready[1], tuple(line.strip() for line in ready[2].splitlines()), ready[3]) if ready else None


@dataclass(frozen=True)
class Replica:
    """One of several engines of a running server."""

    name: str
    up: bool
    running: int
    waiting: int
    adapters: int
    restarts: int


@dataclass(frozen=True)
class Replicas:
    """The engines of a running server, if it has several."""

    each: tuple[Replica, ...]
    wanted: int | None
    """The number that the load asks for; None if it is fixed."""


def replicas(server: Served) -> Replicas | None:
    """Return the replicas of a running server by its metrics: none of one engine; None if the metrics do not answer."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    if server.metrics is None:
        return Replicas((), None)
    try:
        answer = httpx.get(server.metrics, timeout=_ANSWER_S, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError:
        return None
    values: dict[str, dict[str, int]] = {}
    wanted = None
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == _WANTED:
                wanted = int(sample.value)
            elif sample.name.startswith(_REPLICA) and "replica" in sample.labels:
                values.setdefault(sample.labels["replica"], {})[sample.name.removeprefix(_REPLICA)] = int(sample.value)
    return Replicas(tuple(_replica(name, found) for name, found in values.items()), wanted)


def _replica(name: str, found: dict[str, int]) -> Replica:
    running, waiting = found["running_requests"], found["waiting_requests"]
    return Replica(name, bool(found["up"]), running, waiting, found["adapters"], found["restarts_total"])


def outcome(job: Job) -> str:
    """Return the result of a release's job in a word."""
    return job.state if job.exit_code is None else _OUTCOMES.get(job.exit_code, job.state)


def refusal(job: Job) -> list[str]:
    """Return what to do after a check refused a release; empty if none did."""
    if job.command[0] not in RELEASES or job.exit_code not in (3, 4):
        return []
    command = " ".join(["tunewright", *job.command[: job.command.index("--project")]])
    force = f'If the verdict or the serving check refused it: {command} --force --because "why"'
    untested = f'If the isolation test cannot tell the adapters apart: {command} --untested "why"'
    # A candidate that was forced stays forced when it is promoted.
    ways = [untested] if job.command[0] == "promote" else [force, untested]
    return [
        "A check did not allow this release, and the alias is unchanged. The log has the reasons.",
        "The studio does not force a release. In a terminal, a reason that is stored does:",
        *ways,
    ]
