"""Build the wheel, and install it on every supported Python that this machine has.

python tests/check_wheel.py [--first-and-last]

On each Python, or on the oldest and the newest: all dependencies resolve, and a fresh environment with those that the
command line loads runs ``tunewright --help`` and ``tunewright init``. The rest (torch and what needs it) is left to the
project's own environment, which runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINORS = (11, 12, 13)
# The packages that are imported by the time every command is registered and one has run.
_LOADED = """
import sys
from importlib.metadata import packages_distributions
from tunewright.cli import commands
from typer.testing import CliRunner
assert CliRunner().invoke(commands(), ["init", sys.argv[1], "--example", "orders"]).exit_code == 0
known = packages_distributions()
print(*{name for module in sys.modules for name in known.get(module.partition(".")[0], ())})
"""


def main() -> None:
    """Build, compare and install; fail with what is not as promised."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        run(sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(ROOT))
        (wheel,) = (work / "dist").glob("*.whl")
        check_content(wheel)
        loaded = output(
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{_LOADED}",
            str(work / "loaded"),
        ).split()
        needed = sorted(name for name in loaded if name.lower() not in {"tunewright", "pip", "setuptools"})
        found = interpreters()
        if "--first-and-last" in sys.argv:
            found = {minor: found[minor] for minor in (min(found), max(found))}
        for minor, python in found.items():
            check_install(python, wheel, needed, work / f"3.{minor}")
            say(f"Python 3.{minor}: installs, prints its help and writes a project")
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


def check_install(python: str, wheel: Path, needed: list[str], folder: Path) -> None:
    """Install the wheel in an environment of its own and use it there."""
    run(python, "-m", "venv", str(folder))
    pip = [str(folder / "bin" / "pip"), "--disable-pip-version-check", "--quiet"]
    run(*pip, "install", "--dry-run", str(wheel))
    run(*pip, "install", "--constraint", str(ROOT / "constraints.txt"), *needed)
    run(*pip, "install", "--no-deps", str(wheel))
    command = str(folder / "bin" / "tunewright")
    assert "Usage: tunewright" in output(command, "--help")
    assert output(command, "--version").startswith("tunewright ")
    run(command, "init", str(folder / "project"))
    assert "train:" in (folder / "project" / "tunewright.yaml").read_text(encoding="utf-8")
    run(command, "data", "--help")
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
