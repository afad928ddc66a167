"""``export hub``: a folder that peft and transformers load, and a push to a hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from making.command_line import trained_project, tunewright
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.versions import load_version
from tunewright.open_project import OpenProject

BASE = "org/tiny-base"


@dataclass
class Hub:
    """A hub that takes commits: the routes of the hub's client, with its requests and the committed files."""

    url: str = ""
    refuses: bool = False
    created: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._reply(200, None)

    def do_GET(self) -> None:
        self._reply(200, {"id": "ada/tiny", "sha": "5" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.refuses:
            self._reply(403, {"error": "You have no right to write here"})
        else:
            self._reply(200, self._answer(body))

    def _answer(self, body: bytes) -> dict[str, Any]:
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return {"url": f"{self.hub.url}/ada/tiny"}
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if self.path == "/api/models/ada/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        assert self.path == "/api/models/ada/tiny/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.hub.url}/ada/tiny/commit/{'5' * 40}", "commitOid": "5" * 40}

    def _reply(self, status: int, value: Any) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    short = ("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n")
    return trained_project(tmp_path_factory.mktemp("hub") / "project", tiny_base_folder, ("0.003", "0.01"), short)


def test_adapter_folder_loads_in_peft_and_names_no_local_path(project: Path, tmp_path: Path) -> None:
    ran = tunewright("export", "hub", "-p", project, "--to", tmp_path / "hub", "--base-model", BASE, "--json")
    assert ran.code == 0, ran.stderr
    folder = Path(ran.document["folder"])
    assert (ran.document["pushed"], ran.document["evidence"]) == (None, None)
    assert any("there is no evidence: run `tunewright evaluate" in note for note in ran.document["notes"])
    for name in ran.document["files"]:
        assert str(project.parent).encode() not in (folder / name).read_bytes(), name
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    card: Any = ModelCard.load(folder / "README.md")
    assert card.data.base_model == BASE

    context = OpenProject(ProjectFolder(project), LogReporter())
    member = load_version(context.folder.dataset, None).examples("test")[0].example.prompt
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [m.as_dict() for m in member], add_generation_prompt=True, return_dict=False
    )
    assert tuple(ids) == context.chat.prompt(member)
    (own,) = ProjectFolder(project).adapters.iterdir()
    found = []
    for adapter in (folder, own):
        base = AutoModelForCausalLM.from_pretrained(context.base.folder, dtype=torch.float32)
        with torch.inference_mode():
            found.append(PeftModel.from_pretrained(base, adapter)(input_ids=torch.tensor([ids])).logits)
    assert torch.equal(*found)


def test_push_commits_the_folder_without_its_record(project: Path, tmp_path: Path, hub: Hub) -> None:
    arguments = ("export", "hub", "-p", project, "--to", tmp_path / "hub", "--push", "ada/tiny")
    ran = tunewright(*arguments, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["pushed"] == f"{hub.url}/ada/tiny/commit/{'5' * 40}"
    assert hub.created[0]["name"] == "tiny"
    assert hub.created[0]["visibility"] == "private"
    assert hub.files.keys() == ran.document["files"].keys()
    for name, content in hub.files.items():
        assert content == (tmp_path / "hub" / name).read_bytes()
    assert b'PeftModel.from_pretrained(base, "ada/tiny")' in hub.files["README.md"]
    again = tunewright(*arguments, "--public", "--json")
    assert (again.code, again.document["made"]) == (0, False)
    assert hub.created[1]["visibility"] == "public"


def test_refused_push_is_one_error_and_keeps_the_folder(project: Path, tmp_path: Path, hub: Hub) -> None:
    hub.refuses = True
    ran = tunewright("export", "hub", "-p", project, "--to", tmp_path / "hub", "--push", "ada/tiny")
    assert ran.code == 2
    assert "The hub refused the push to ada/tiny" in ran.stderr
    assert "hf auth login" in ran.stderr
    assert (tmp_path / "hub" / "README.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--push", "tiny"), "Not a hub id: 'tiny'"),
        (("--base-model", "/bases/tiny"), "Not a hub id: '/bases/tiny'"),
        (("--public",), "`--public` requires `--push`"),
    ],
)
def test_export_hub_refuses_wrong_options(project: Path, options: tuple[str, ...], message: str) -> None:
    ran = tunewright("export", "hub", "-p", project, *options)
    assert ran.code == 2
    assert message in ran.stderr


@pytest.mark.slow
def test_card_follows_the_evidence_and_the_merged_model_is_compared(project: Path, hub: Hub) -> None:
    before = tunewright("export", "hub", "-p", project, "--json")
    assert before.document["evidence"] is None
    evaluated = tunewright("evaluate", "-p", project, "--json")
    evidence = evaluated.document["evidence"]["id"]
    stale = tunewright("export", "hub", "-p", project)
    assert (stale.code, "card differs" in stale.stderr) == (2, True)
    ran = tunewright("export", "hub", "--merged", "-p", project, "--push", "ada/tiny", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["evidence"] == evidence
    assert hub.messages[0].endswith(f"evidence {evidence}")
    card: Any = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_args["evidence"] == evidence
    assert "Merging rounds weights: mean KL" in card.text
    assert "model.safetensors" in hub.files
    assert "export.json" not in hub.files
