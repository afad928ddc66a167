"""The isolation test holds one base at a time: the reference's, the engine's, the reference's again."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.command_line import trained_project
from making.command_line import tunewright as command
from making.counted_bases import counted_bases

pytestmark = pytest.mark.slow


def test_isolation_test_has_one_base_in_memory_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base_folder: Path
) -> None:
    project = trained_project(tmp_path / "project", tiny_base_folder, ("epochs: 2", "epochs: 1"), count=80)
    with counted_bases(monkeypatch) as counts:
        ran = command("serve", "--self-test", "-p", project)
    assert ran.code in (0, 4), ran.stderr
    # The reference's second load is left out where all answers are the ones that it gave itself.
    assert counts in ([0] * 2, [0] * 3)
