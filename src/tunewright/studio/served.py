"""Notes on finished releases and running servers, from their jobs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tunewright.studio.jobs import SERVER, Job

_READY = re.compile(r"^Serving at (\S+)/v1\n((?:  .+\n)*)", re.MULTILINE)
_BEGINNING = 100_000  # characters of a log; the address comes right after loading
RELEASES = ("deploy", "promote")
_OUTCOMES = {0: "done", 3: "refused", 4: "undecided"}


@dataclass(frozen=True)
class Served:
    """The address of a running server."""

    url: str
    models: tuple[str, ...]
    """Names that requests may ask for; empty if there are tenants and no alias is live."""

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
    return Served(ready[1], tuple(line.strip() for line in ready[2].splitlines())) if ready else None


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
