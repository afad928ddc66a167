"""Release a version: refuse what cannot be released, run the checks, and build the files.

python tests/release.py VERSION [--files] [--without CHECK ...] --checks CHECK ...
python tests/release.py --versions SITE

A check is a target of the Makefile. Three run at a time, each with its output in ``build/release/COMMIT/CHECK.log``.
A pass is noted there, and the same commit does not run that check again. ``--files`` runs no check. The files go to
``dist/VERSION`` if every check has passed on this commit, and to ``dist/VERSION-unchecked`` otherwise. ``--versions``
only writes the index of a site of several versions.
Nothing here tags, pushes or publishes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PASSED = ROOT / "build" / "release"
PACKAGING = ROOT / "build" / "packaging" / "bin"
SBOM = ROOT / "build" / "audit" / "bin" / "cyclonedx-py"
WHOLE = ("RELEASE=yes", "EXAMPLES=all", "ADVISORIES=", "ARGS=")
"""A release leaves out nothing, whatever the caller's own variables say."""
AT_ONCE = 3
FIRST = "environments"
"""Runs before the others and next to none of them: two checks would install one environment at the same time."""
APART = ({"test-ray", "test-vllm", "test-vllm-workers"}, {"bounds", "engines-cuda", "test-wheel"})
"""Checks that do not run next to each other: clusters and engines of one machine, and gigabytes of environments."""


def main() -> int:
    """Return the exit code: 0 if the files were built, 1 if a check or a build failed, 2 if the release is refused."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("version", nargs="?", default="")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--checks", nargs="*", default=[])
    parser.add_argument("--versions", type=Path)
    given = parser.parse_args()
    if given.versions is not None:
        write_versions(given.versions)
        return 0
    unknown = [f"WITHOUT names '{each}', which is no check" for each in given.without if each not in given.checks]
    if refused := unknown + refusals(given.version):
        sys.stderr.write("".join(f"Refused: {line}\n" for line in refused))
        return 2
    commit = git("rev-parse", "HEAD")
    if not given.files:
        asked = [each for each in given.checks if each not in given.without]
        if left := not_passed(asked, commit):
            say(f"NOT PASSED on commit {commit[:12]}: {', '.join(left)}. The same command runs only these again.")
            return 1
    try:
        publishable(given.version, commit, given.checks)
    except subprocess.CalledProcessError as error:
        say(f"FAILED: {' '.join(map(str, error.cmd))}\n{error.stdout}{error.stderr}")
        return 1
    return 0


def refusals(version: str) -> list[str]:
    """Return a line for each reason against releasing this version from the working tree."""
    try:
        normal = str(Version(version))
    except InvalidVersion:
        return [f"VERSION '{version}' is not a version of PEP 440, such as 0.9.0 or 1.0.0rc1"]
    found = []
    if normal != version:
        found.append(f"VERSION '{version}' is not normalized: write {normal}")
    stated = re.findall(r'"(.*)"', (ROOT / "src" / "tunewright" / "_version.py").read_text(encoding="utf-8"))
    if stated != [version]:
        found.append(f"VERSION is {version}, and src/tunewright/_version.py says {', '.join(stated)}")
    if changed := git("status", "--porcelain").splitlines():
        found.append(f"The working tree differs from its commit: {len(changed)} files, such as {changed[0][3:]}")
    tagged, commit = (
        git("tag", "--list", f"v{version}", "--format=%(*objectname)%(objectname)"),
        git("rev-parse", "HEAD"),
    )
    # The hosted workflow runs on the tagged commit itself.
    if tagged and not tagged.startswith(commit):
        found.append(f"{version} exists: tag v{version} is commit {tagged[:12]}, and this is {commit[:12]}")
    if (DIST / version).exists():
        found.append(f"{version} exists: its files are in dist/{version}")
    if not release_notes(version, ROOT):
        found.append(f"CHANGELOG.md has no text under '## {version} (unreleased)' or '## {version} (DATE)'")
    golden = ROOT / "tests" / "golden"
    if lzma.decompress((golden / "surface_released.txt.xz").read_bytes()) != (golden / "surface.txt").read_bytes():
        found.append(f"The surface of {version} is not on record: run `make surface ARGS=--released`, and commit")
    return found


def release_notes(version: str, folder: Path) -> str:
    """Return the changelog's text on a version; empty if it has none."""
    heading = rf"^## {re.escape(version)} \((?:unreleased|\d{{4}}-\d\d-\d\d)\)$"
    text = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"{heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def not_passed(checks: list[str], commit: str) -> list[str]:
    """Run three checks at a time; return those that fail, or that Ctrl-C ends. A pass on record is not repeated."""
    folder = PASSED / commit
    folder.mkdir(parents=True, exist_ok=True)
    for check in (each for each in checks if (folder / each).exists()):
        say(f"-- {check}: {(folder / check).read_text(encoding='utf-8').strip()}")
    waiting = [each for each in checks if not (folder / each).exists()]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VERSION", "WITHOUT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    # Tests fail, instead of skipping, where PostgreSQL or Chromium is not installed. One thread each, as in .ci/run.
    environment |= {"CI": "true", "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            apart = {other for group in APART if group & running.keys() for other in group}
            free = [each for each in waiting if each not in apart and FIRST not in running]
            if free and len(running) < AT_ONCE:
                waiting.remove(check := free[0])
                log = folder / f"{check}.log"
                say(f"-- {check}: runs ({log.relative_to(ROOT)})")
                command = ["make", check, *WHOLE]
                with log.open("wb") as file:
                    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
                running[check] = process, time.monotonic()
                continue
            pid, status, used = os.wait4(-1, 0)
            check = next(each for each, (process, _) in running.items() if process.pid == pid)
            process, started = running.pop(check)
            process.returncode = os.waitstatus_to_exitcode(status)
            took = f"{time.monotonic() - started:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time"
            if (changed := git("status", "--porcelain")) or git("rev-parse", "HEAD") != commit:
                say(f"-- {check}: the working tree is no longer commit {commit[:12]}\n{changed}")
                failed.append(check)
            elif process.returncode:
                tail = (folder / f"{check}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
                say("\n".join([*tail, f"-- {check}: FAILED after {took}"]))
                failed.append(check)
            else:
                passed = f"passed on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {took}"
                say(f"-- {check}: {passed}")
                (folder / check).write_text(passed + "\n", encoding="utf-8")
    except KeyboardInterrupt:  # the checks, which are in the same process group, have got it too
        for process, _ in running.values():
            process.wait()
    return [each for each in checks if each in (*failed, *running, *waiting)]


def publishable(version: str, commit: str, checks: list[str]) -> None:
    """Build every file of the release, and move them to dist/ once all of them are there."""
    notes = {check: PASSED / commit / check for check in checks}
    passed = {check: note.read_text(encoding="utf-8").strip() for check, note in notes.items() if note.exists()}
    missing = [check for check in checks if check not in passed]
    say("Installing what builds a release")
    run("make", "build/packaging/.installed", "build/audit/.installed")
    PASSED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PASSED) as temporary:
        work, built = Path(temporary), Path(temporary) / "files"
        built.mkdir()
        build_packages(commit, work, built)
        run(PACKAGING / "twine", "check", "--strict", *sorted(built.iterdir()))
        describe_install(version, work, built)
        build_site(version, work, built)
        (built / "NOTES.md").write_text(release_notes(version, work / "first") + "\n", encoding="utf-8")
        checked = "".join(f"{check}: {passed.get(check, 'NOT PASSED')}\n" for check in checks)
        (built / "CHECKS.txt").write_text(f"commit {commit}\n{checked}", encoding="utf-8")
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in listed(built)]
        (built / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
        folder = DIST / (f"{version}-unchecked" if missing else version)
        shutil.rmtree(DIST / f"{version}-unchecked", ignore_errors=True)
        DIST.mkdir(exist_ok=True)
        built.rename(folder)
    summarize(folder, version, commit, missing)


def build_packages(commit: str, work: Path, built: Path) -> None:
    """Build sdist and wheel from two exports of the commit, which have no untracked file, and compare the bytes."""
    say("Building sdist and wheel twice from exports of the commit")
    environment = os.environ | {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct", commit)}
    sums = []
    for name in ("first", "second"):
        source, out = work / name, work / f"{name}-built"
        run("git", "archive", "--output", work / f"{name}.tar", commit)
        with tarfile.open(work / f"{name}.tar") as archive:
            archive.extractall(source, filter="data")
        run(PACKAGING / "python", "-m", "build", "--no-isolation", "--outdir", out, source, env=environment)
        sums.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())})
    assert sums[0] == sums[1], f"two builds of one commit differ: {sums}"
    for file in (work / "first-built").iterdir():
        shutil.move(file, built)


def describe_install(version: str, work: Path, built: Path) -> None:
    """Install the wheel with its runtime dependencies, ask it for its version, and list the packages as CycloneDX."""
    say("Installing the wheel in a new environment, and listing its packages")
    (wheel,) = built.glob("*.whl")
    python = work / "environment" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", work / "environment")
    pip = (PACKAGING / "pip", "--python", python, "install", "--quiet", "--no-compile")
    run(*pip, "--constraint", work / "first" / "constraints.txt", wheel)
    shown = run(python.with_name("tunewright"), "--version")
    assert f"tunewright {version}" in shown, shown
    file = built / f"tunewright-{version}.cdx.json"
    options = ("--pyproject", work / "first" / "pyproject.toml", "--output-reproducible", "--output-file", file)
    run(SBOM, "environment", *options, python)
    document = json.loads(file.read_bytes())
    # pyproject.toml has the version in another file, which the tool does not read.
    document["metadata"]["component"] |= {"version": version, "purl": f"pkg:pypi/tunewright@{version}"}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def build_site(version: str, work: Path, built: Path) -> None:
    """Build the documentation below a folder of the version, and pack that folder for later releases' sites."""
    say("Building the documentation")
    site = built / "site"
    mkdocs = (Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", site / version)
    run(*mkdocs, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, cwd=work / "first")
    write_versions(site)
    with tarfile.open(built / f"tunewright-{version}-docs.tar.gz", "w:gz") as archive:
        archive.add(site / version, version)


def write_versions(site: Path) -> None:
    """Write the list that the theme's selector of versions reads, and the page that leads to the newest version."""
    versions = sorted((Version(folder.name) for folder in site.iterdir() if folder.is_dir()), reverse=True)
    newest = next((each for each in versions if not each.is_prerelease), versions[0])
    listing = [
        {"version": f"{each}", "title": f"{each}", "aliases": ["latest"] * (each == newest)} for each in versions
    ]
    (site / "versions.json").write_text(json.dumps(listing) + "\n", encoding="utf-8")
    (site / "index.html").write_text(
        f'<!doctype html><title>tunewright</title><meta http-equiv="refresh" content="0; url={newest}/">\n'
        f'<a href="{newest}/">tunewright {newest}</a>\n',
        encoding="utf-8",
    )


def summarize(folder: Path, version: str, commit: str, missing: list[str]) -> None:
    """Say what was built, and what is left for a person to do."""
    say(f"\n{folder.relative_to(ROOT)}, from commit {commit[:12]}:")
    for file in listed(folder):
        say(f"{file.stat().st_size:>12,}  {file.name}")
    pages = [file for file in (folder / "site").rglob("*") if file.is_file()]
    say(f"{sum(file.stat().st_size for file in pages):>12,}  site/ ({len(pages)} files)\n")
    if missing:
        say(f"NOT A RELEASE: on this commit, these checks have not passed: {', '.join(missing)}.")
    else:
        say(
            "Every check passed. Next, a person (CONTRIBUTING.md, 'Release', has each step):\n"
            f"  git tag --sign v{version} {commit[:12]} --message 'tunewright {version}'\n"
            f"  git push origin v{version}    the hosted workflow builds again, and waits for a reviewer to publish"
        )


def listed(folder: Path) -> list[Path]:
    """Return the files of a release, without the site's own."""
    return sorted(file for file in folder.iterdir() if file.is_file())


def git(*words: str) -> str:
    """Return what git says about the project."""
    return run("git", *words).rstrip()


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Return a command's output; an error has it where the command fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=cwd or ROOT).stdout


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
