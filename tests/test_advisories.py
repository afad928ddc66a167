"""`make audit` fails closed, on stand-ins for pip-audit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import check_advisories
from check_advisories import KNOWN, main

ADVISORY = {"id": "CVE-2019-10906", "fix_versions": ["2.10.1"]}


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "constraints.txt"
    file.write_text("# Pins.\nattrs==26.1.0+cpu\njinja2==2.10\n")
    monkeypatch.setattr(check_advisories, "PINS", (file,))
    monkeypatch.setattr(check_advisories, "ROOT", tmp_path)
    return file


def _tool(folder: Path, known: list[Any], pinned: list[Any]) -> str:
    """A program that reports ``known`` on the package with known advisories, and ``pinned`` on the pins."""
    file = folder / "pip-audit"
    file.write_text(
        f"#!{sys.executable}\nimport sys\npins = open(sys.argv[-1]).read()\n"
        f"assert '+' not in pins\n"
        f"print({json.dumps({'dependencies': known})!r} if pins == {KNOWN!r} else "
        f"{json.dumps({'dependencies': pinned})!r})\n"
    )
    file.chmod(0o700)
    return str(file)


def _package(name: str, *advisories: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": "1", "vulns": list(advisories)}


KNOWN_FOUND = [_package("jinja2", ADVISORY)]
SKIPPED = {"name": "jinja2", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("known", "pinned", "code", "printed"),
    [
        (KNOWN_FOUND, [_package("attrs"), _package("jinja2")], 0, "no advisory on 2 packages"),
        (KNOWN_FOUND, [_package("attrs"), *KNOWN_FOUND], 1, "jinja2 1: CVE-2019-10906, fixed in 2.10.1"),
        (KNOWN_FOUND, [_package("attrs"), SKIPPED], 1, "jinja2: not checked: Dependency not found"),
        (KNOWN_FOUND, [_package("attrs")], 1, "1 of 2 packages were checked"),
        ([SKIPPED], [_package("attrs"), _package("jinja2")], 1, "NOT AUDITED"),
        ([_package("jinja2")], [_package("attrs"), _package("jinja2")], 1, "NOT AUDITED"),
    ],
)
def test_audit_fails_unless_every_pin_was_checked(
    known: list[Any],
    pinned: list[Any],
    code: int,
    printed: str,
    pins: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(_tool(tmp_path, known, pinned), optional=False) == code
    assert printed in capsys.readouterr().out


def test_audit_without_advisories_says_so_when_optional(
    pins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_tool(tmp_path, [SKIPPED], []), optional=True) == 0
    assert f"has the known advisories on {KNOWN}" in capsys.readouterr().out
