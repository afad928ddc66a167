"""Build the wheel, and install it on every supported Python that this machine has.

python tests/check_wheel.py [--first-and-last]

On each Python, or on the oldest and the newest: the dependencies of training resolve, and in an environment with an
installation without extras, so without torch, a project of an earlier version is read and rows are checked. The rest is
left to the project's own environment, which runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINORS = (11, 12, 13)


def main() -> None:
    """Build, compare and install; fail with what is not as promised."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        run(sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(ROOT))
        (wheel,) = (work / "dist").glob("*.whl")
        check_content(wheel)
        found = interpreters()
        if "--first-and-last" in sys.argv:
            found = {minor: found[minor] for minor in (min(found), max(found))}
        for minor, python in found.items():
            check_install(python, wheel, work / f"3.{minor}")
            say(f"Python 3.{minor}: installs without torch, and reads, checks, judges and reports")
        for minor in MINORS:
            if minor not in found:
                say(f"Python 3.{minor}: not tried")


def check_content(wheel: Path) -> None:
    """Every file of the package and of the example projects that git knows is in the wheel, and nothing else."""
    tracked = output("git", "-C", str(ROOT), "ls-files", "src/tunewright", "examples/bfcl", "examples/orders").split()
    wanted = {
        name.removeprefix("src/") if name.startswith("src/") else f"tunewright/{name}"
        for name in tracked
        if (ROOT / name).exists()
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("tunewright/")}
    assert wanted == packed, f"missing: {sorted(wanted - packed)}; not in git: {sorted(packed - wanted)}"


def check_install(python: str, wheel: Path, folder: Path) -> None:
    """Install the wheel in an environment of its own, without extras, and use it there."""
    run(python, "-m", "venv", str(folder))
    pip = [str(folder / "bin" / "pip"), "--disable-pip-version-check", "--quiet"]
    run(*pip, "install", "--dry-run", f"{wheel}[train]")
    run(*pip, "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    run(*pip, "check")
    assert not list(folder.glob("lib/*/site-packages/torch"))
    command = str(folder / "bin" / "tunewright")
    assert "Usage: tunewright" in output(command, "--help")
    assert output(command, "--version").startswith("tunewright ")
    run(command, "init", str(folder / "project"))
    assert "train:" in (folder / "project" / "tunewright.yaml").read_text(encoding="utf-8")
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"{letter}{letter}", "completion": letter} for letter in "abcdefghijkl"]
    rows.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    run(command, "data", "check", str(rows), "-p", str(folder / "project"))
    with tarfile.open(ROOT / "tests" / "golden" / "project-1.tar.xz") as archive:
        archive.extractall(folder / "golden", filter="data")
    for words in (("data", "log"), ("adapters", "list"), ("report",)):
        run(command, *words, "-p", str(folder / "golden"))
    refused = subprocess.run([command, "demo", str(folder / "demo")], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    run(command, "init", str(folder / "orders"), "--example", "orders")
    assert (folder / "orders" / "agent.py").read_bytes() == (ROOT / "examples" / "orders" / "agent.py").read_bytes()


def interpreters() -> dict[int, str]:
    """Return the supported Pythons of this machine by minor version: on the PATH, of pyenv, or the running one."""
    candidates = [sys.executable]
    candidates += [path for minor in MINORS if (path := shutil.which(f"python3.{minor}"))]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))]
    found: dict[int, str] = {}
    for python in candidates:
        # A shim of pyenv is on the PATH for versions that it refuses to run.
        shown = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
        version = re.match(r"Python 3\.(\d+)", shown.stdout)
        if shown.returncode == 0 and version and int(version[1]) in MINORS:
            found.setdefault(int(version[1]), python)
    return dict(sorted(found.items()))


def run(*command: str) -> None:
    """Run a command; fail with its output."""
    output(*command)


def output(*command: str) -> str:
    """Return a command's output; fail with its output."""
    # pip would take the sources on PYTHONPATH for an installed tunewright.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
