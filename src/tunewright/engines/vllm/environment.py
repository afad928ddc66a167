"""vLLM's own environment: its pins fight the trainer's, so it is a virtual environment beside it."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import platformdirs
from packaging.requirements import Requirement

from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import Reporter, Task

Build = Literal["cpu", "cuda"]

MARK = "tunewright-engine.json"
"""Written last: an environment without it is not whole."""
GIGABYTES = {"cpu": (0.6, 2.4), "cuda": (5.0, 11.0)}
"""To download, and on the disk."""

_AT_ONCE = 8
_TAIL = 12

# Imports what a server needs, in the environment itself.
_PROBE = """
import json, importlib.metadata as metadata
import vllm, vllm.entrypoints.openai.api_server, vllm.lora.resolver, torch
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.cuda.is_available()}))
"""


@dataclass(frozen=True)
class Environment:
    """An environment that is whole."""

    folder: Path
    build: Build
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"folder": str(self.folder), "build": self.build, "versions": self.versions}


def pins(build: Build) -> tuple[str, ...]:
    """Return the requirements of a build that hold on this machine, each with its version."""
    text = resources.files("tunewright.engines.vllm").joinpath(f"{build}.txt").read_text(encoding="utf-8")
    wanted = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    return tuple(f"{w.name}{w.specifier}" for w in wanted if w.marker is None or w.marker.evaluate())


def build_for_this_machine() -> Build:
    """With CUDA where a driver answers, else without."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def default_folder(build: Build) -> Path:
    """Where an environment is if nobody says otherwise; other pins have another folder."""
    return platformdirs.user_cache_path("tunewright") / "engines" / f"vllm-{build}-{digest(list(pins(build)))[:12]}"


def find(build: Build | None = None) -> Environment:
    """Return the environment that is installed.

    Raises:
        UserError: there is none.
    """
    for candidate in (build,) if build else ("cuda", "cpu"):
        folder = default_folder(candidate)
        elsewhere = folder.with_suffix(".json")
        if elsewhere.exists():
            folder = Path(json.loads(elsewhere.read_text(encoding="utf-8"))["folder"])
        whole = _marked(folder)
        if whole is not None and whole.build == candidate:
            return whole
    raise UserError("the engine vllm is not installed", fix="`tunewright engine install vllm` does that.")


def install(
    reporter: Reporter,
    *,
    to: Path | None = None,
    build: Build | None = None,
    torch_index: str | None = None,
    requirements: Sequence[str] | None = None,
    probe: str = _PROBE,
) -> Environment:
    """Make vLLM's environment, or go on where an earlier call was cut off; nothing is done where it is whole.

    Args:
        to: its folder (None: in the user's cache).
        build: None: by whether there is a GPU.
        torch_index: where PyTorch's builds without CUDA are (None: where pip looks anyway, as it is set up).
        requirements, probe: other packages, and what imports them.

    Raises:
        UserError: no such build for this machine, no room on the disk, or pip fails.
    """
    build = build or build_for_this_machine()
    _require_platform()
    wanted = pins(build) if requirements is None else tuple(requirements)
    folder = (to or default_folder(build)).absolute()
    whole = _marked(folder)
    if whole is not None and whole.build == build and _mark(folder)["pins"] == digest(list(wanted)):
        return _remembered(whole, to)
    _require_free(folder, build)
    download, on_disk = GIGABYTES[build]
    reporter.say(
        f"Installing vLLM ({build}) into {folder}: {len(wanted)} packages, about {download} GB to download, "
        f"{on_disk} GB on the disk"
    )
    (folder / MARK).unlink(missing_ok=True)
    if not (folder / "bin" / "pip").exists():
        _run([sys.executable, "-m", "venv", str(folder)], folder)
    with reporter.task("Installing", len(wanted), "packages") as task:
        _install_missing(folder, wanted, torch_index, task)
    reporter.say("Importing vLLM, which compiles its Python files: a minute or two")
    versions = json.loads(_run([str(folder / "bin" / "python"), "-c", probe], folder).splitlines()[-1])
    write_json(folder / MARK, {"build": build, "pins": digest(list(wanted)), "versions": versions})
    return _remembered(Environment(folder, build, versions), to)


def _remembered(environment: Environment, to: Path | None) -> Environment:
    """Note where an environment is that is not in the default place."""
    elsewhere = default_folder(environment.build).with_suffix(".json")
    if to is not None:
        write_json(elsewhere, {"folder": str(environment.folder)})
    else:
        elsewhere.unlink(missing_ok=True)
    return environment


def _mark(folder: Path) -> dict[str, Any]:
    mark: dict[str, Any] = json.loads((folder / MARK).read_text(encoding="utf-8"))
    return mark


def _marked(folder: Path) -> Environment | None:
    if not (folder / MARK).exists():
        return None
    mark = _mark(folder)
    return Environment(folder, mark["build"], mark["versions"])


def _install_missing(folder: Path, wanted: Sequence[str], torch_index: str | None, task: Task) -> None:
    there = _installed(folder)
    missing = [pin for pin in wanted if pin not in there]
    if len(missing) < len(wanted):
        task.advance(len(wanted) - len(missing), note="there already")
    for group in _groups(missing):
        pip = [str(folder / "bin" / "pip"), "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
        try:
            _run([*pip, *group], folder)
        except UserError as error:
            if "No matching distribution" not in error.what or not any("+cpu" in pin for pin in group):
                raise
            if torch_index is None:
                raise UserError(
                    f"pip finds no {' or '.join(group)}, a build without CUDA",
                    where=str(folder),
                    fix='PyTorch keeps these in an index of its own, which its page "Get started" names for the CPU: '
                    "give its address with --torch-index.",
                ) from None
            _run([*pip, "--extra-index-url", torch_index, *group], folder)
        task.advance(len(group), note=group[-1])


def _groups(missing: Sequence[str]) -> Iterator[list[str]]:
    """A few at a time, so that a second call goes on where the first was cut off; the large ones alone."""
    alone = [pin for pin in missing if re.match(r"(torch|vllm(-cpu)?|torchvision)==", pin)]
    others = [pin for pin in missing if pin not in alone]
    yield from ([pin] for pin in alone)
    yield from (others[start : start + _AT_ONCE] for start in range(0, len(others), _AT_ONCE))


def _installed(folder: Path) -> set[str]:
    """Return what is whole in an environment, as pins; what is not is taken away, since pip takes it for whole."""
    found = set()
    for info in folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists() or not (info / "INSTALLER").exists():
            shutil.rmtree(info)
            continue
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        found.add(f"{_normal(name)}=={version}")
    return _Pins(found)


class _Pins(set[str]):
    """Pins, however their names are spelt."""

    def __contains__(self, pin: object) -> bool:
        name, _, version = str(pin).partition("==")
        return super().__contains__(f"{_normal(name)}=={version}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(command: Sequence[str], folder: Path) -> str:
    """Return what a command prints.

    Raises:
        UserError: it fails; with the end of what it says.
    """
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        tail = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-_TAIL:])
        raise UserError(
            f"{Path(command[0]).name} {' '.join(command[1:3])} failed:\n{tail}",
            where=str(folder),
            fix="Mend that, and run the same command again: it goes on where it stopped.",
        )
    return ran.stdout


def _require_platform() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UserError(
            f"there is no build of vLLM for {sys.platform} on {platform.machine()}",
            fix="The engine peft runs here, and needs nothing besides.",
        )


def _require_free(folder: Path, build: Build) -> None:
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    needed, free = GIGABYTES[build][1] * 1e9 - there, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"vLLM needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free",
            where=str(place),
            fix="Free some space, or give another folder with --to.",
        )
