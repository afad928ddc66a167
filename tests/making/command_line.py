"""Running the command line in this process, and projects to run it on."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from tunewright.cli import commands

if TYPE_CHECKING:
    from tunewright.adapters.registry import Adapter
    from tunewright.evidence.schema import Evidence

COLOURS = ["red", "green", "blue", "amber", "violet", "ochre", "teal", "navy", "olive", "coral"]


@dataclass(frozen=True)
class Ran:
    """Output and exit code of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        value: dict[str, Any] = json.loads(self.stdout)
        return value


def tunewright(*arguments: str | Path) -> Ran:
    """Run a command; an exception that leaves here is a traceback that the user would see."""
    code: Any = 0
    with CliRunner().isolation() as (stdout, stderr, _):
        try:
            _command().main([str(a) for a in arguments], prog_name="tunewright")
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        return Ran(code, *(stream.getvalue().decode().replace("\r\n", "\n") for stream in (stdout, stderr)))


@contextmanager
def served(project: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`serve` as a process on any free port, with what it says at its start; killed at the end."""
    command = [sys.executable, "-m", "tunewright", "serve", *options, "--port", "0", "--json", "-p", str(project)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        yield process, json.loads(said)
    finally:
        process.kill()
        process.communicate()


def interrupted(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C, which ends a server well, and return what it said on stderr."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, "Traceback" in stderr) == (0, False), stderr
    return stderr


@cache
def _command() -> Any:
    """Return the command line, built once: `CliRunner.invoke` builds it for each call, which takes 20 ms.

    typer brings its own copy of click, whose classes have no stubs.
    """
    return typer.main.get_command(commands())


def parsed(line: str | Sequence[str]) -> tuple[str, ...]:
    """Parse a command line with the command line's own parser, run nothing, and return the command's names."""
    program, *arguments = shlex.split(line) if isinstance(line, str) else line
    assert program == "tunewright"
    command, names = _command(), []
    context = command.make_context("tunewright", list(arguments))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        names.append(name)
        context = command.make_context(name, rest, parent=context)
    return tuple(names)


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of unlike inputs; the output is the input's first word, which a model of any size can learn to copy."""
    generator = random.Random(seed)
    words = [" ".join(generator.sample(COLOURS, 3)) + f" {n * 7919 % 10007}" for n in range(count)]
    return [{"prompt": text, "completion": text.split()[0]} for text in words]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_project(folder: Path, base: Path, count: int = 120) -> Path:
    """A project on a tiny base whose whole pipeline takes seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", pairs(count))
    (folder / "tunewright.yaml").write_text(
        f"name: tiny\nbase_model: {base}\ndata:\n  sources: [pairs.jsonl]\n"
        "train:\n  preset: all-linear\n  learning_rate: 0.003\n  batch_size: 8\n  epochs: 2\n  dtype: float32\n"
        "  save_steps: 5\nevaluate:\n  num_fewshot: [1, 2]\n"
        # A base of random weights ends its turns late or never: that is waited for where it is what is tested.
        "regressions:\n  samples: 0\n"
    )
    return folder


def trained_project(folder: Path, base: Path, *changes: tuple[str, str], count: int = 120) -> Path:
    """A project with a dataset version and an adapter; ``changes`` are those of the config's text.

    Projects that differ in nothing are copies of one that is trained once.
    """
    return Path(shutil.copytree(_trained(base, changes, count), folder))


@cache
def _trained(base: Path, changes: tuple[tuple[str, str], ...], count: int) -> Path:
    folder = tiny_project(Path(mkdtemp(prefix="trained-", dir=base.parent)) / "project", base, count)
    config = folder / "tunewright.yaml"
    text = config.read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    config.write_text(text, encoding="utf-8")
    for command in (("data", "add", folder / "pairs.jsonl"), ("train",)):
        ran = tunewright(*command, "-p", folder)
        assert ran.code == 0, ran.stderr
    return folder


def document(project: Path, *arguments: str | Path) -> Any:
    """The JSON document of a command, which succeeds."""
    ran = tunewright(*arguments, "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    return ran.document


def evaluation_of(project: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The evidence of the project's only evaluation, and its items."""
    (folder,) = (p for p in (project / "evaluations").iterdir() if p.is_dir())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return json.loads((folder / "evidence.json").read_text()), items


def store_evidence(project: Path, adapter: Adapter, evidence: Evidence, number: int = 1) -> None:
    """Evidence on an adapter, as `evaluate` leaves it."""
    from tunewright.evaluation.access_log import AccessLog

    lineage = evidence.lineage | {
        "created": f"2026-11-0{number}T10:00:00+00:00",
        "adapter": {"name": adapter.name, "digest": adapter.digest, "lineage": adapter.lineage},
    }
    stored = evidence.model_copy(update={"id": f"{number:012x}", "lineage": lineage})
    evaluations = project / "evaluations"
    AccessLog(evaluations).write(evaluations / stored.id / "evidence.json", stored.model_dump_json())


def without_state(project: Path, folder: Path) -> Path:
    """The trained project in a new folder, without a serving state of others."""
    folder.mkdir()
    for name in ("tunewright.yaml", "adapters"):
        (folder / name).symlink_to(project / name)
    copy_dataset(project, folder)
    return folder


def copy_dataset(project: Path, folder: Path) -> None:
    """Copy a project's dataset without its copy of the access log, which belongs to the project's evaluations."""
    shutil.copytree(project / "dataset", folder / "dataset", ignore=shutil.ignore_patterns("access_log.jsonl"))


def recorded_prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that gets the prompt's ids of every request that an engine is asked from now on."""
    from tunewright.engines.peft import PeftEngine
    from tunewright.engines.protocol import TokenSink
    from tunewright.generation.requests import Request

    seen: list[tuple[int, ...]] = []
    submit = PeftEngine.submit

    def recording(self: PeftEngine, request: Request, sink: TokenSink, **options: Any) -> Callable[[], object]:
        seen.append(tuple(request.prompt_ids))
        return submit(self, request, sink, **options)

    monkeypatch.setattr(PeftEngine, "submit", recording)
    return seen
