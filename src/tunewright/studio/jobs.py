"""Commands that the studio starts. Each is a process with a log, and lives on when the studio ends."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Literal

import psutil

from tunewright.core.author import AUTHOR_VARIABLE, stated_author
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.processes import NOTHING, start
from tunewright.studio.job_log import JobProgress, newest

JobState = Literal["running", "done", "stopped", "failed", "ended"]
SERVER = "serve"
"""The command that runs next to another job."""

_END = 100_000  # bytes of a log in which the newest message and progress are looked for
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
    """Its time, in ISO 8601."""

    @property
    def id(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def title(self) -> str:
        """Its command without options, such as *train* or *data suspects*."""
        return " ".join(self.command[:2] if self.command[0] == "data" else self.command[:1])

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
        """Its state; *ended* if it was killed, so that nobody knows its exit code."""
        running = self._shell() is not None
        # Read after the process was looked up: it writes the code before it ends.
        code = self.exit_code
        if code is not None:
            return _STATES.get(code, "failed")
        return "running" if running else "ended"

    def stop(self) -> None:
        """Press Ctrl-C: the command keeps what it has finished, and ends."""
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
    """The jobs of a project, in ``.tunewright/jobs``.

    Args:
        folder: where they are kept.
        project: the project's folder.
    """

    def __init__(self, folder: Path, project: Path) -> None:
        self._folder = folder.resolve()
        self._project = project.resolve()

    def all(self) -> list[Job]:
        """Return all jobs, newest first."""
        found = [_read(record.parent) for record in self._folder.glob("*/job.json")]
        return sorted(found, key=lambda job: job.started, reverse=True)

    def find(self, name: str) -> Job:
        """Return a job.

        Raises:
            UserError: there is no such job.
        """
        if re.fullmatch("[0-9a-f]{16}", name) and (self._folder / name / "job.json").is_file():
            return _read(self._folder / name)
        raise UserError(f"There is no job {name!r}", fix="Choose one of the list.")

    def running(self) -> Job | None:
        """Return the job that is running, or None. A server is not counted: it runs next to others."""
        return next((job for job in self.all() if job.command[0] != SERVER and job.state == "running"), None)

    def server(self) -> Job | None:
        """Return the newest server that was started here, running or not."""
        return next((job for job in self.all() if job.command[0] == SERVER), None)

    def start(self, *words: str) -> Job:
        """Start ``tunewright`` with these arguments. The same command resumes work that was stopped.

        It records its work under the stated author.

        Raises:
            UserError: another job is running, or for a server another server.
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
        # Its progress is for the page, whatever the environment says; the page shows the log as text.
        program = (sys.executable, "-m", "tunewright", "--log-format", "json")
        child = start(
            ["/bin/sh", "-c", _SHELL, str(folder), *program, *command],
            stdin=NOTHING,
            env=os.environ | ({AUTHOR_VARIABLE: author} if author else {}),
        )
        while not (folder / "pid").exists() and child.poll() is None:
            time.sleep(0.002)
        # It ends with the command, or with the studio.
        Thread(target=child.wait, name="tunewright-job", daemon=True).start()
        return _read(folder)


def _read(folder: Path) -> Job:
    record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return Job(folder, tuple(record["command"]), record["started"])
