"""`make release` refuses what cannot be released, repeats no check that passed, and builds the same bytes twice."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import release

ROOT = Path(__file__).parents[1]
MAKEFILE = """\
lint test:
\techo $@ $(RELEASE) $(ADVISORIES) >> build/ran
\ttest $@ = lint || test -e build/mended
format:
\techo >> CHANGELOG.md
environments test-ray test-vllm test-vllm-workers:
hang:
\techo $$$$ > build/new && mv build/new build/pid && exec sleep 600
build/packaging/.installed build/audit/.installed:
"""
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tunewright"
requires-python = ">=3.11"
readme = "README.md"
dynamic = ["version"]
[project.scripts]
tunewright = "tunewright:main"
[tool.hatch.version]
path = "src/tunewright/_version.py"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of one commit that version 0.9.0 can be released from."""
    files = {
        "Makefile": MAKEFILE,
        "pyproject.toml": PROJECT,
        ".gitignore": "/build/\n/dist/\n",
        "CHANGELOG.md": "# Changelog\n\n## 0.9.0 (unreleased)\n\n- data: one.\n\n## 0.8.0 (2026-01-02)\n\n- First.\n",
        "src/tunewright/_version.py": '__version__ = "0.9.0"\n',
        "src/tunewright/__init__.py": (
            "from tunewright._version import __version__\ndef main(): print('tunewright', __version__)\n"
        ),
        "README.md": "A project.\n",
        "constraints.txt": "",
        "mkdocs.yml": "site_name: tunewright\n",
        "docs/index.md": "# tunewright\n",
        "tests/golden/surface.txt": "command: train\n",
        "tests/release.py": Path(release.__file__).read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "tests/golden/surface_released.txt.xz").write_bytes(lzma.compress(b"command: train\n"))
    (tmp_path / "build").mkdir()
    _git(tmp_path, "init", "--quiet")
    _commit(tmp_path)
    return tmp_path


def _git(project: Path, *words: str) -> str:
    names = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@b.example", "GIT_COMMITTER_NAME": "A"}
    environment = os.environ | names | {"GIT_COMMITTER_EMAIL": "a@b.example", "GIT_CONFIG_GLOBAL": os.devnull}
    ran = subprocess.run(["git", *words], cwd=project, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def _commit(project: Path) -> None:
    _git(project, "add", "--all")
    _git(project, "commit", "--quiet", "--allow-empty", "--message", "Change")


def _write(project: Path, name: str, text: str) -> None:
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text(text, encoding="utf-8")


def _release(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "tests" / "release.py"), *words]
    environment = os.environ | {"RELEASE": "no", "MAKEFLAGS": " -- ADVISORIES=optional"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _ran(project: Path) -> list[str]:
    """The checks that ran, by name, and what they got for RELEASE and ADVISORIES."""
    return sorted((project / "build" / "ran").read_text(encoding="utf-8").splitlines())


def _at_once(output: str) -> list[set[str]]:
    """The checks that were running after each one started, from the output."""
    running: set[str] = set()
    found = []
    for check, event in re.findall(r"^-- (\S+): (runs|passed|FAILED)", output, re.MULTILINE):
        if event == "runs":
            running = running | {check}
            found.append(running)
        else:
            running = running - {check}
    return found


@pytest.mark.parametrize("version", ["", "next", "v0.9.0", "0.9.0-rc1"])
def test_release_refuses_a_version_that_is_not_normal(project: Path, version: str) -> None:
    refused = _release(project, version, "--checks", "lint")
    assert refused.returncode == 2
    assert f"'{version}'" in refused.stderr.splitlines()[0]
    assert "Traceback" not in refused.stderr


def test_release_refuses_a_version_that_the_source_does_not_have(project: Path) -> None:
    _write(project, "src/tunewright/_version.py", '__version__ = "0.9.1"\n')
    _commit(project)
    _is_refused(project, "0.9.0", "0.9.1", "_version.py")


@pytest.mark.parametrize("name", ["notes.txt", "CHANGELOG.md"])
def test_release_refuses_a_tree_that_differs_from_its_commit(project: Path, name: str) -> None:
    with (project / name).open("a") as file:
        file.write("more\n")
    _is_refused(project, "1 files", name)


@pytest.mark.parametrize("annotated", [False, True])
def test_release_refuses_a_tag_on_another_commit_only(project: Path, annotated: bool) -> None:
    _git(project, "tag", "v0.9.0", *(["--annotate", "--message", "0.9.0"] if annotated else []))
    assert _release(project, "0.9.0", "--checks", "test").returncode == 1  # the check ran, and failed
    _commit(project)
    _is_refused(project, "v0.9.0", _git(project, "rev-parse", "HEAD")[:12], _git(project, "rev-parse", "HEAD~")[:12])


def test_release_refuses_a_version_whose_files_exist(project: Path) -> None:
    (project / "dist" / "0.9.0").mkdir(parents=True)
    _is_refused(project, "dist/0.9.0")


@pytest.mark.parametrize(
    "text",
    ["## 0.8.0 (2026-01-02)\n\n- First.\n", "## 0.9.0 (unreleased)\n\n## 0.8.0 (2026-01-02)\n", "## 0.9.0\n\n- A\n"],
)
def test_release_refuses_a_changelog_without_text_on_the_version(project: Path, text: str) -> None:
    _write(project, "CHANGELOG.md", text)
    _commit(project)
    _is_refused(project, "CHANGELOG.md", "0.9.0")


def test_release_refuses_a_surface_that_is_not_on_record(project: Path) -> None:
    _write(project, "tests/golden/surface.txt", "command: fit\n")
    _commit(project)
    _is_refused(project, "surface", "--released")


def test_release_refuses_to_leave_out_an_unknown_check(project: Path) -> None:
    _is_refused(project, "'adit'", words=("--without", "adit"))


def test_release_gives_every_reason(project: Path) -> None:
    (project / "dist" / "0.9.1").mkdir(parents=True)
    refused = _release(project, "0.9.1", "--checks", "lint")
    assert [line.split()[0] for line in refused.stderr.splitlines()] == ["Refused:"] * 3


def _is_refused(project: Path, *named: str, words: tuple[str, ...] = ()) -> None:
    before = sorted(project.rglob("*"))
    for kind in ([], ["--files"]):
        refused = _release(project, "0.9.0", *kind, *words, "--checks", "lint")
        assert refused.returncode == 2, refused.stdout
        (line,) = refused.stderr.splitlines()
        assert all(name in line for name in named), line
    assert [file for file in sorted(project.rglob("*")) if ".git" not in file.parts] == [
        file for file in before if ".git" not in file.parts
    ]


def test_release_runs_every_check_whole_and_repeats_only_what_failed(project: Path) -> None:
    failed = _release(project, "0.9.0", "--checks", "test", "lint")
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1].split(":")[1].split(".")[0].strip() == "test"
    assert _ran(project) == ["lint yes", "test yes"]
    (project / "build" / "mended").touch()
    _release(project, "0.9.0", "--checks", "test", "lint")
    assert _ran(project) == ["lint yes", "test yes", "test yes"]
    _commit(project)
    _release(project, "0.9.0", "--checks", "test", "lint")
    assert _ran(project) == ["lint yes"] * 2 + ["test yes"] * 3


def test_release_keeps_each_output_and_shows_the_end_of_one_that_failed(project: Path) -> None:
    failed = _release(project, "0.9.0", "--checks", "test", "lint")
    folder = project / "build" / "release" / _git(project, "rev-parse", "HEAD")
    assert sorted(file.name for file in folder.iterdir()) == ["lint", "lint.log", "test.log"]
    assert (folder / "lint.log").read_text().startswith("echo lint yes")
    assert (folder / "test.log").read_text() in failed.stdout
    assert "echo lint" not in failed.stdout


def test_release_runs_three_checks_at_a_time_after_their_environments(project: Path) -> None:
    checks = ["environments", "test-ray", "test-vllm-workers", "lint", "test", "test-vllm"]
    running = _at_once(_release(project, "0.9.0", "--checks", *checks).stdout)
    assert running[:4] == [
        {"environments"},
        {"test-ray"},
        {"test-ray", "lint"},
        {"test-ray", "lint", "test"},
    ]
    assert max(map(len, running)) == 3
    assert all(len(each & {"test-ray", "test-vllm", "test-vllm-workers"}) <= 1 for each in running)
    assert set().union(*running) == set(checks)


def test_interrupted_release_leaves_no_process_and_keeps_what_passed(project: Path) -> None:
    command = [sys.executable, str(project / "tests" / "release.py"), "0.9.0", "--checks", "lint", "hang"]
    pid = project / "build" / "pid"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as interrupted:
        assert interrupted.stdout is not None
        until = time.monotonic() + 300  # only ends a hang
        while not (pid.exists() and list(project.glob("build/release/*/lint"))):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does
        said = interrupted.stdout.read()
    assert interrupted.returncode == 1
    assert said.splitlines()[-1].startswith("NOT PASSED") and ": hang." in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_check_that_changes_the_tree_has_not_passed(project: Path) -> None:
    changed = _release(project, "0.9.0", "--checks", "format")
    assert changed.returncode == 1
    assert "CHANGELOG.md" in changed.stdout
    assert not list((project / "build").rglob("format"))


def test_check_that_is_left_out_does_not_run(project: Path) -> None:
    _release(project, "0.9.0", "--without", "test", "--checks", "lint", "test")
    assert _ran(project) == ["lint yes"]


def test_selector_lists_versions_from_new_to_old_and_leads_to_the_newest_final_one(tmp_path: Path) -> None:
    for version in ("0.9.0", "0.10.0", "1.0.0rc1"):
        (tmp_path / version).mkdir()
    release.write_versions(tmp_path)
    listing = json.loads((tmp_path / "versions.json").read_bytes())
    assert [(each["version"], each["aliases"]) for each in listing] == [
        ("1.0.0rc1", []),
        ("0.10.0", ["latest"]),
        ("0.9.0", []),
    ]
    assert 'url=0.10.0/"' in (tmp_path / "index.html").read_text()


def test_every_check_of_a_release_is_a_target() -> None:
    # Not as a part of the make that may run this test, with its variables and its messages on folders.
    alone = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL"}
    }

    def shown(*arguments: str) -> str:
        made = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
        )
        return made.stdout

    checks = shown("release", "VERSION=0.9.0").split("--checks")[1].split()
    assert {"audit", "test-all", "test-wheel"} <= set(checks)
    for check in checks:
        shown(check, *release.WHOLE)


@pytest.mark.slow
def test_release_has_the_same_bytes_each_time_and_exists_once(project: Path) -> None:
    for name in ("packaging", "audit"):
        if not (ROOT / "build" / name / ".installed").exists():
            pytest.skip(f"`make build/{name}/.installed` installs what builds a release")
        (project / "build" / name).symlink_to(ROOT / "build" / name)
    trial = _release(project, "0.9.0", "--without", "test", "--checks", "lint", "test")
    assert trial.returncode == 0, trial.stdout + trial.stderr
    assert trial.stdout.splitlines()[-1] == "NOT A RELEASE: on this commit, these checks have not passed: test."
    unchecked = project / "dist" / "0.9.0-unchecked"
    assert "test: NOT PASSED" in (unchecked / "CHECKS.txt").read_text()
    packages = [unchecked / name for name in ("tunewright-0.9.0-py3-none-any.whl", "tunewright-0.9.0.tar.gz")]
    before = [file.read_bytes() for file in packages]
    (project / "build" / "mended").touch()
    released = _release(project, "0.9.0", "--checks", "lint", "test")
    assert "NOT A RELEASE" not in released.stdout
    assert "git tag --sign v0.9.0" in released.stdout
    folder = project / "dist" / "0.9.0"
    assert sorted(folder.parent.iterdir()) == [folder]
    assert [(folder / file.name).read_bytes() for file in packages] == before
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in sums} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file() and file.name != "SHA256SUMS"
    }
    assert (folder / "NOTES.md").read_text() == "- data: one.\n"
    assert (folder / "site" / "0.9.0" / "index.html").exists()
    component = json.loads((folder / "tunewright-0.9.0.cdx.json").read_bytes())["metadata"]["component"]
    assert (component["name"], component["version"]) == ("tunewright", "0.9.0")
    _is_refused(project, "dist/0.9.0")
