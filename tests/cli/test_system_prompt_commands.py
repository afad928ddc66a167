"""System prompts of training at serving: the same ids as in training and evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

import tunewright
from making.command_line import recorded_prompts, trained_project, without_state
from tunewright.adapters.lineage import KEY
from tunewright.adapters.registry import LINEAGE, Adapter, find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.versions import Member
from tunewright.evaluation.arms import TUNED
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.open_project import OpenProject
from tunewright.serving.gateway.server import Service
from tunewright.serving.options import ServeOptions
from tunewright.serving.serve import adapter_of

pytestmark = pytest.mark.slow

SYSTEM = "Name the first colour, d'été."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    # Not composed, as an editor may write it: what is added and what is asked have one form all the same.
    system = 'data:\n  system_prompt: "Name the first colour, d\'e\u0301te\u0301."\n'
    folder = tmp_path_factory.mktemp("system") / "project"
    return trained_project(folder, tiny_base_folder, ("data:\n", system))


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return without_state(trained, tmp_path / "project")


def _adapter(project: Path) -> Adapter:
    return find_adapter(project / "adapters")


def _test_members(project: Path) -> Sequence[Member]:
    return tunewright.open(project).data.version().examples("test")


def _ask_users_turns(service: Service, model: str, members: Sequence[Member]) -> list[httpx.Response]:
    """The replies to each row's user turn alone."""
    with service.running() as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        replies = []
        for member in members:
            messages = [m.as_dict() for m in member.example.prompt if m.role != "system"]
            body = {"model": model, "messages": messages, "max_tokens": 4}
            replies.append(client.post("/v1/chat/completions", json=body))
        return replies


def test_serve_renders_a_user_turn_to_the_ids_of_the_tuned_arm(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, members = _adapter(project), _test_members(project)
    opened = OpenProject(ProjectFolder(project), LogReporter())
    evaluated = open_arm_runner(opened, adapter).answers(TUNED, members, "test", adapter)
    seen = recorded_prompts(monkeypatch)
    replies = _ask_users_turns(
        tunewright.open(project).serve([adapter.name], ServeOptions(port=0)), adapter.name, members
    )
    assert {reply.headers["x-tunewright-system"] for reply in replies} == {"adapter"}
    assert seen == [answered.prompt for answered in evaluated]
    assert all(member.example.prompt[0].content == SYSTEM for member in members)
    trained_on = opened.chat.encode(members[0].example.messages).ids
    assert trained_on[: len(seen[0])] == seen[0]


def test_serve_adds_no_system_prompt_to_the_base(project: Path) -> None:
    service = tunewright.open(project).serve([_adapter(project).name], ServeOptions(port=0))
    (reply,) = _ask_users_turns(service, ProjectFolder(project).config.base_model, _test_members(project)[:1])
    assert reply.headers["x-tunewright-system"] == "none"


def test_deploy_releases_the_named_adapter_when_two_have_the_same_weights(trained: Path, tmp_path: Path) -> None:
    project = without_state(trained, tmp_path / "project")
    adapter = _adapter(trained)
    (project / "adapters").unlink()
    other = project / "adapters" / f"another-{adapter.digest[:12]}"
    for folder in (project / "adapters" / adapter.name, other):
        shutil.copytree(adapter.folder, folder)
    older = {**adapter.lineage, "created": "2020-01-01T00:00:00+00:00", KEY: {"text": "Say nothing."}}
    (other / LINEAGE).write_text(json.dumps(older), encoding="utf-8")
    opened = OpenProject(ProjectFolder(project), LogReporter())
    assert adapter_of(opened, adapter.name, adapter.digest).name == adapter.name
    assert adapter_of(opened, "a-name-that-is-gone", adapter.digest).name == other.name
