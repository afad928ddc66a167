"""Python names of earlier versions: each still works, and names what replaced it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.command_line import tiny_project
from tunewright.core.errors import UserError


def test_deprecated_methods_call_what_replaced_them(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tunewright.open(tiny_project(tmp_path / "project", tiny_base_folder))
    with pytest.warns(DeprecationWarning, match=r"state\.tenants\.add\(\)"):
        project.tenant.add("acme", ["legal"])
    with pytest.warns(DeprecationWarning, match=r"state\.keys\.create\(\)"):
        made = project.tenant.key.add("acme", lifetime=60.0)
    with pytest.warns(DeprecationWarning, match=r"state\.verify\(\)"):
        assert not project.audit.verify().faults
    with project.state() as state:
        assert [tenant.name for tenant in state.tenants.list()] == ["acme"]
        assert state.keys.list("acme") == [made.key]
        assert [line.action for line in state.audit.lines()] == ["tenant.add", "key.add"]
    with pytest.warns(DeprecationWarning, match=r"evaluate\(dev=True\)"), pytest.raises(UserError):
        project.evaluate_on_dev()
    assert not hasattr(project.tenant, "rename")
    with pytest.warns(DeprecationWarning, match="engines.environment"), pytest.raises(UserError, match="'tgi'"):
        project.engine.show("tgi")


def test_verb_takes_fields_of_its_options_as_keywords(tmp_path: Path, tiny_base_folder: Path) -> None:
    project: Any = tunewright.open(tiny_project(tmp_path / "project", tiny_base_folder))
    with (
        pytest.warns(DeprecationWarning, match=r"ImportOptions\(unsigned=True\) to import_\(\)"),
        pytest.raises(UserError),
    ):
        project.adapters.import_(tmp_path / "nowhere", unsigned=True)
    with pytest.raises(TypeError, match="sealed"):
        project.adapters.import_(tmp_path / "nowhere", sealed=True)
