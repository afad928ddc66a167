"""Notes on finished releases and running servers, from their jobs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunewright.studio.jobs import SERVER, Job

if TYPE_CHECKING:
    from tunewright.serving.engines.pool import EngineState

_READY = re.compile(
    r"^Serving at (\S+)/v1\n((?:  .+\n)*)(?:\n?Prometheus metrics: (\S+)$)?",
    re.MULTILINE,
)
_ANSWER_S = 1.0  # on this machine; other pages wait meanwhile
_ENGINE = "tunewright_engine_"
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


def engines(server: Served) -> list[EngineState] | None:
    """Return a running server's engines by its metrics: empty if it has one itself; None if they do not answer."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    if server.metrics is None:
        return []
    # It imports torch, which a page without a running server does not need.
    from tunewright.serving.engines.pool import EngineState

    try:
        answer = httpx.get(server.metrics, timeout=_ANSWER_S, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError:
        return None
    values: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name.startswith(_ENGINE):
                values.setdefault(sample.labels["engine"], {})[sample.name.removeprefix(_ENGINE)] = int(sample.value)
    return [
        EngineState(url, bool(found["up"]), found["running_requests"], found["adapters"], found["restarts_total"])
        for url, found in values.items()
    ]


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
