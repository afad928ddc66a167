"""Commands that the studio starts: processes that outlive it, their logs, and the servers and releases among them."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import psutil

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.log import AUTHOR_VARIABLE, stated_author
from tunewright.core.processes import NOTHING, start
from tunewright.core.text import visible


@dataclass(frozen=True)
class JobProgress:
    """The newest state of the work that a job reported last."""

    done: int
    total: int
    text: str
    """Task, numbers and the time left, in a line."""

    def as_json(self) -> str:
        """Return the progress for the page's script."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class LogEntry:
    """A line of the file: the text for people, and the values that it reports."""

    text: str
    progress: JobProgress | None = None
    message: bool = False
    """True for a message of the command; False for a line of its result, or of a log by an earlier release."""

    @property
    def lines(self) -> list[str]:
        """The text's lines, without control characters."""
        return [visible(line) for line in self.text.splitlines()] or [""]


def read_entry(line: str) -> LogEntry:
    """Return the entry in a line of the file."""
    record = _record(line)
    if record is None:
        return LogEntry(line)
    text = _record_text(record)
    if isinstance(record.get("task"), str):
        done, total = record.get("done"), record.get("total")
        if isinstance(done, int) and isinstance(total, int) and total > 0:
            return LogEntry(text, JobProgress(min(done, total), total, visible(text)))
    return LogEntry(text, message=True)


def newest(content: bytes) -> tuple[JobProgress | None, str]:
    """Return the newest progress in the end of a log, and the first line of its newest message, or an empty text."""
    progress, message = None, ""
    for line in content.decode(errors="replace").splitlines()[::-1]:
        entry = read_entry(line)
        progress = progress or entry.progress
        if entry.message and not message:
            message = entry.lines[0]
        if progress and message:
            break
    return progress, message


def _record(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("message"), str) and "level" in found else None


def _record_text(record: dict[str, Any]) -> str:
    text: str = record["message"]
    if "exception" in record:
        return f"{text}\n{record['exception']}"
    if record["level"] == "error":
        return f"Error: {UserError(text, where=record.get('where'), fix=record.get('fix'))}"
    own = record.get("logger") == "tunewright"
    if record["level"] == "warning":
        return f"Warning: {text}" if own else f"Warning of {record.get('logger')}: {text}"
    return text


JobState = Literal["running", "done", "stopped", "failed", "ended"]
SERVER = "serve"
"""The command that runs next to another job."""

_END = 100_000  # bytes of a log to search for the newest message and progress
_STATES: dict[int, JobState] = {0: "done", 3: "done", 4: "done", 130: "stopped"}
# The shell records its number and the exit code, so that nothing is lost when the studio is killed.
_SHELL = """echo $$ > "$0/pid.part"; mv "$0/pid.part" "$0/pid"
"$@" > "$0/log" 2>&1
echo $? > "$0/exit_code.part"; mv "$0/exit_code.part" "$0/exit_code\""""


@dataclass(frozen=True)
class Job:
    """A started command."""

    folder: Path
    command: tuple[str, ...]
    started: str
    """The time of its start, in ISO 8601."""

    @property
    def id(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def title(self) -> str:
        """The job's command without options, such as *train* or *data suspects*."""
        return " ".join(self.command[:2] if self.command[0] == "data" else self.command[:1])

    @property
    def minute(self) -> str:
        """The minute of its start (UTC)."""
        return self.started[:16].replace("T", " ")

    @property
    def log(self) -> Path:
        """The file with all output."""
        return self.folder / "log"

    @property
    def newest(self) -> tuple[JobProgress | None, str]:
        """The newest progress that it reported, and its newest message, or an empty text."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _END))
            return newest(log.read())

    @property
    def exit_code(self) -> int | None:
        """The command's exit code; None while it runs, or if the shell was killed."""
        with suppress(FileNotFoundError):
            return int((self.folder / "exit_code").read_text(encoding="ascii"))
        return None

    @property
    def state(self) -> JobState:
        """Its state; *ended* if it was killed, so that its exit code is unknown."""
        running = self._shell() is not None
        # Read after the process was looked up: it writes the code before it ends.
        code = self.exit_code
        if code is not None:
            return _STATES.get(code, "failed")
        return "running" if running else "ended"

    def stop(self) -> None:
        """Stop the command as Ctrl-C does: it keeps finished work, and ends."""
        shell = self._shell()
        if shell is not None:
            with suppress(psutil.NoSuchProcess):
                for child in shell.children():
                    child.send_signal(signal.SIGINT)

    def _shell(self) -> psutil.Process | None:
        """Return the shell that waits for the command; None if it has ended."""
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            process = psutil.Process(int((self.folder / "pid").read_text(encoding="ascii")))
            # A later process may have got the number.
            if str(self.folder) in process.cmdline():
                return process
        return None


class Jobs:
    """The jobs of a project, in ``.tunewright/jobs``."""

    def __init__(self, folder: Path, project: Path) -> None:
        self._folder = folder.resolve()
        self._project = project.resolve()

    def all(self) -> list[Job]:
        """Return all jobs, newest first."""
        found = [_read(record.parent) for record in self._folder.glob("*/job.json")]
        return sorted(found, key=lambda job: job.started, reverse=True)

    def find(self, name: str) -> Job:
        """Return a job."""
        if re.fullmatch("[0-9a-f]{16}", name) and (self._folder / name / "job.json").is_file():
            return _read(self._folder / name)
        raise UserError(f"There is no job {name!r}", fix="Choose one of the list.")

    def running(self) -> Job | None:
        """Return the running job, or None. A server is not counted: it runs next to others."""
        return next((job for job in self.all() if job.command[0] != SERVER and job.state == "running"), None)

    def server(self) -> Job | None:
        """Return the newest server that was started here, running or not."""
        return next((job for job in self.all() if job.command[0] == SERVER), None)

    def start(self, *words: str) -> Job:
        """Start ``tunewright`` with these arguments. The same command resumes work that was stopped.

        It records its work under the stated author.
        """
        busy = self.server() if words[0] == SERVER else self.running()
        if busy is not None and busy.state == "running":
            raise UserError(f"{busy.title} is running", fix="Wait for it, or stop it first.")
        folder = self._folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        command = (*words, "--project", str(self._project))
        author = stated_author()
        (folder / "log").touch()
        write_text(folder / "job.json", json.dumps({"command": command, "started": now()}))
        # Its progress is for the page, regardless of the environment; the page shows the log as text.
        program = (sys.executable, "-m", "tunewright", "--log-format", "json")
        child = start(
            ["/bin/sh", "-c", _SHELL, str(folder), *program, *command],
            stdin=NOTHING,
            env=os.environ | ({AUTHOR_VARIABLE: author} if author else {}),
        )
        while not (folder / "pid").exists() and child.poll() is None:
            time.sleep(0.002)
        # The thread ends with the command, or with the studio.
        Thread(target=child.wait, name="tunewright-job", daemon=True).start()
        return _read(folder)


def _read(folder: Path) -> Job:
    record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return Job(folder, tuple(record["command"]), record["started"])


_READY = re.compile(
    r"^Serving at (\S+)/v1\n((?:  .+\n)*)(?:\n?Prometheus metrics: (\S+)$)?",
    re.MULTILINE,
)
_ANSWER_S = 1.0  # enough on this machine; other pages wait meanwhile
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
        """Return a command that queries the last model; ``key``: with a tenant's API key from the environment."""
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
class EngineState:
    """An engine of a server over several, by the server's metrics."""

    url: str
    up: bool
    running: int
    adapters: int
    restarts: int


def engines(server: Served) -> list[EngineState] | None:
    """Return a running server's engines by its metrics: empty if it has one itself; None if they do not answer."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    if server.metrics is None:
        return []
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


def trial_of(job: Job) -> str:
    """Return what the adapter of a release's job does while it is on trial; empty if it answers every request."""
    share = next((word.removeprefix("--canary=") for word in job.command if word.startswith("--canary=")), None)
    if share is not None:
        return f"answers {share} of the requests, the live adapter the rest"
    return "gets a copy of each request, and nobody receives its answers" if "--shadow" in job.command else ""


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
