"""Commands of the pipeline, the project that each starts from, and what it leaves as other commands read it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faulty import counted

from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_items
from making.forked import Command, Ended, Fault, Server
from making.scripted_judge import Server as Judge
from making.scripted_judge import write_project
from tunewright.evidence.files import load_evidence

UNFINISHED_PURGE = "the purge is not finished"
HANG_S = 180
"""A guard against commands that hang, no expectation."""
NO_THREAD = "Exception ignored in thread started by"
"""Printed where a thread has no memory to begin, for which ``Thread.start`` then waits without end
(https://github.com/python/cpython/issues/140746). Threads of libraries meet it, as the one that loads a model does:
such a command is as good as killed."""
FORCED = ("--force", "--because", "a test of faults", "--untested", "a test of faults")


@dataclass(frozen=True)
class Case:
    """A command with the stage it starts from.

    ``state`` reads what there is afterwards; it must equal that before the command or that after it.
    """

    stage: str
    command: tuple[str, ...]
    state: Callable[[Stages], Any]
    codes: tuple[int, ...] = (0,)
    """Exit codes of the undisturbed command."""
    between: Any = None
    """Another state that an unfinished command may leave, which `verify` reports."""
    quick: bool = True
    """The command takes well under a second."""
    makes: str | None = None
    """The stage that it makes."""


class Stages:
    """Copies of projects at a stage, always in the same folder, and commands on them."""

    def __init__(self, root: Path, base: Path, server: Server, judge: Judge, *, release: bool) -> None:
        self.root = root
        self.release = release
        self.judge = judge
        self.base = base
        self.server = server
        self.work = root / "work"
        self.project = self.work / "project"
        self.kept = root / "stages"
        self._warm: set[tuple[str, ...]] = set()
        self._listed: dict[str, tuple[Any, Any, list[str]]] = {}

    def prepare(self, stage: str) -> None:
        """Put a fresh project of this stage into the working folder."""
        if not (self.kept / stage).exists():
            shutil.rmtree(self.work, ignore_errors=True)
            self._build(stage)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept / stage, self.work, symlinks=True)

    def _build(self, stage: str) -> None:
        if stage == "new":
            tiny_project(self.project, self.base, 72)
            config = self.project / "tunewright.yaml"
            text = config.read_text().replace("epochs: 2", "epochs: 1").replace("batch_size: 8", "batch_size: 16")
            # Answers of one token: what is tested is the files.
            config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 1\n").replace("[1, 2]", "[1]"))
            write_jsonl(self.project / "few.jsonl", pairs(4, seed=5))
        elif stage == "nothing":
            self.project.mkdir(parents=True)
        elif stage == "unpulled":
            self.prepare("pushed")
            shutil.rmtree(self.project / "dataset")
        elif stage == "unjudged":
            judge = {"base_url": self.judge.url, "model": "scripted", "concurrency": 2, "max_retries": 8}
            write_project(self.project, judge, make_items(32))
        elif stage == "foreign":
            self.prepare("trained")
            (adapter,) = (self.project / "adapters").iterdir()
            adapter.rename(self.project / "foreign")
        elif stage == "second":
            self.prepare("deployed")
            config = self.project / "tunewright.yaml"
            config.write_text(config.read_text().replace("0.003", "0.03"))
            assert self.run(("train",)).code == 0
        elif stage == "tenants":
            self.prepare("second")
            newest = self.read("adapters", "list")["adapters"][-1]["name"]
            self.read("deploy", "recipes", newest, *FORCED)
            keys = {}
            for tenant, alias in (("acme", "courts"), ("globex", "recipes")):
                self.read("tenant", "add", tenant, "--alias", alias)
                keys[alias] = self.read("tenant", "key", "add", tenant)["key"]
            (self.project / "keys.json").write_text(json.dumps(keys))
        else:
            case = next(case for case in CASES.values() if case.makes == stage)
            self.prepare(case.stage)
            assert self.run(case.command).code in case.codes
        shutil.copytree(self.work, self.kept / stage, symlinks=True)

    def named(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """Return a command with the project's own paths and adapters."""
        words = [word.replace("PROJECT", str(self.project)).replace("WORK", str(self.work)) for word in command]
        for word, place in (("OLDEST", 0), ("NEWEST", -1)):
            if word in words:
                words[words.index(word)] = self.read("adapters", "list")["adapters"][place]["name"]
        return tuple(words)

    def start(self, command: tuple[str, ...], fault: Fault | None = None, memory: int | None = None) -> Command:
        """Start a command on the project."""
        words = self.named(command)
        warming = fault is None and memory is None and command[:2] not in self._warm
        if warming:
            self._warm.add(command[:2])
        project = () if command[0] == "init" else ("-p", self.project)
        return self.server.start(*words, *project, fault=fault, memory=memory, warming=warming)

    def wait(self, started: Command) -> Ended:
        """Wait for a command's end; one that hangs is ended and fails the test, unless Python left it no way on."""
        hung = threading.Event()

        def end() -> None:
            hung.set()
            started.send(signal.SIGKILL)

        watch = threading.Timer(HANG_S, end)
        watch.start()
        try:
            ended = started.wait()
        finally:
            watch.cancel()
        assert not hung.is_set() or NO_THREAD in ended.stderr, f"the command hung for {HANG_S} s: {ended}"
        return ended

    def run(self, command: tuple[str, ...], fault: Fault | None = None, memory: int | None = None) -> Ended:
        """Run a command to its end."""
        return self.wait(self.start(command, fault, memory))

    def read(self, *command: str, codes: tuple[int, ...] = (0,)) -> Any:
        """Return the JSON document of a command that only reads; None where it says that there is nothing."""
        ended = tunewright(*command, "--json", "-p", self.project)
        assert "Traceback" not in ended.stderr, ended.stderr
        document = json.loads(ended.stdout)
        if ended.code == 2:
            assert document["error"]["what"], document
            return None
        assert ended.code in codes, (command, ended)
        return document

    def listed(self, name: str) -> tuple[Any, Any, list[str]]:
        """Return the states before and after an undisturbed command, and its calls in their order."""
        if name not in self._listed:
            case = CASES[name]
            self.prepare(case.stage)
            before = case.state(self)
            self.prepare(case.stage)
            started = self.start(case.command, self.fault(kinds=31))
            ended = self.wait(started)
            assert ended.code in case.codes, ended
            calls = (started.folder / "faults.calls").read_text().splitlines()
            assert len(calls) == counted(started)[0]
            self._listed[name] = before, case.state(self), calls
        return self._listed[name]

    def fault(self, **how: Any) -> Fault:
        """Return a fault in the working folder."""
        return Fault(str(self.work), **how)


def versions(stages: Stages) -> Any:
    """Return the dataset's versions, of which none is damaged."""
    checked = stages.read("data", "verify", codes=(0, 1))
    reported = ("was purged on", "Metadata of purged rows is still here")
    if (
        checked is not None
        and checked["damage"]
        and all(any(r in d["what"] for r in reported) for d in checked["damage"])
    ):
        return UNFINISHED_PURGE
    assert checked is None or checked["ok"], checked
    log = stages.read("data", "log")
    return [version["digest"] for version in log["versions"]]


def adapters(stages: Stages) -> Any:
    """Return the adapters' digests; none is damaged."""
    found = [adapter["digest"] for adapter in stages.read("adapters", "list")["adapters"]]
    if found:
        assert stages.read("adapters", "verify", codes=(0, 4)) is not None  # 4: unsigned
    return found


def verdict(stages: Stages) -> Any:
    """Return the verdict with its reasons, and how often the test split was opened; None before an evaluation."""
    document = stages.read("verdict", codes=(0, 3, 4))
    openings = stages.read("access-log")
    if document is None:
        return None
    return document["decision"], document["reasons"], len(openings["openings"])


def judgement(stages: Stages) -> Any:
    """Return what the judge found, in evidence whose files are all unchanged; None before it."""
    assert stages.read("access-log") is not None
    assert stages.read("verdict", codes=(0, 3, 4)) is not None
    (evaluation,) = (stages.project / "evaluations").glob("*/evidence.json")
    found = load_evidence(evaluation.parent).judge
    return None if found is None else found.model_dump(exclude={"replaced", "created", "usage", "url"})


def releases(stages: Stages) -> Any:
    """Return the releases, whose audit log is whole."""
    audit = stages.read("audit", "verify")
    assert audit is None or audit["ok"], audit
    found = stages.read("releases")
    return [(one["alias"], one["number"], one["action"], one["adapter"]) for one in found["releases"]] if found else []


def tenants(stages: Stages) -> Any:
    """Return the tenants, whose audit log is whole."""
    audit = stages.read("audit", "verify")
    assert audit is None or audit["ok"], audit
    found = stages.read("tenant", "list")
    return [(one["name"], one["aliases"]) for one in found["tenants"]] if found else []


def files(pattern: str, *without: str) -> Callable[[Stages], Any]:
    """Return a state: the digests of the files that fit a pattern."""

    def state(stages: Stages) -> Any:
        found = sorted(path for path in stages.work.glob(pattern) if path.is_file() and path.name not in without)
        return [(str(path.relative_to(stages.work)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]

    return state


def shared(stages: Stages) -> Any:
    """Return the versions that somebody else gets from the shared folder; None if it has none."""
    other = stages.work / "other"
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    shutil.copy(stages.project / "tunewright.yaml", other)
    ended = tunewright("data", "pull", stages.work / "shared", "-p", other, "--json")
    assert "Traceback" not in ended.stderr, ended.stderr
    if ended.code == 2:
        return None
    done = tunewright("data", "log", "-p", other, "--json").document
    assert tunewright("data", "verify", "-p", other, "--json").document["ok"]
    shutil.rmtree(other)
    return [version["digest"] for version in done["versions"]]


CASES = {
    "init": Case("nothing", ("init", "PROJECT"), files("project/tunewright.yaml")),
    "add": Case("new", ("data", "add", "PROJECT/pairs.jsonl"), versions, makes="added"),
    "add-more": Case("added", ("data", "add", "PROJECT/few.jsonl"), versions),
    "remove": Case("added", ("data", "remove", "--where", "contains(output, 'teal')", "--because", "x"), versions),
    "purge": Case(
        "added",
        ("data", "remove", "--where", "contains(output, 'teal')", "--because", "x", "--purge"),
        versions,
        between=UNFINISHED_PURGE,
    ),
    "push": Case("added", ("data", "push", "WORK/shared"), shared, makes="pushed"),
    "pull": Case("unpulled", ("data", "pull", "WORK/shared"), versions),
    "train": Case("added", ("train",), adapters, makes="trained", quick=False),
    "evaluate": Case("trained", ("evaluate",), verdict, makes="evaluated", quick=False),
    "judge": Case("unjudged", ("judge",), judgement),
    "report": Case("evaluated", ("report",), files("project/evaluations/*/report.html")),
    "deploy": Case("trained", ("deploy", "courts", "OLDEST", *FORCED), releases, makes="deployed"),
    "canary": Case("second", ("deploy", "courts", "NEWEST", "--canary", "10%", *FORCED), releases, makes="candidate"),
    "promote": Case("candidate", ("promote", "courts", *FORCED[3:]), releases),
    "tenant": Case("deployed", ("tenant", "add", "acme", "--alias", "courts"), tenants),
    "export": Case("trained", ("export", "merge", "tiny", "--to", "WORK/out"), files("out/**/*", "export.json")),
    "export-gguf": Case("trained", ("export", "gguf", "tiny", "--to", "WORK/out"), files("out/**/*", "export.json")),
    "export-ollama": Case(
        "trained", ("export", "ollama", "tiny", "--to", "WORK/out"), files("out/**/*", "export.json")
    ),
    "import": Case("foreign", ("adapters", "import", "PROJECT/foreign", "--unsigned"), adapters),
}
