"""Bases that cannot be trained here: one clear error, exit code 2, and no weights fetched."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

# Before a test says that there is a card: libraries look for one when they are imported.
import tunewright.evaluation.crossval
import tunewright.evaluation.learning_curve
import tunewright.training.sweep.sweep
import tunewright.training.trainer  # noqa: F401
from making.command_line import Ran, tiny_project
from making.command_line import tunewright as command

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
GB = 10**9


class _ConfigHub(BaseHTTPRequestHandler):
    """A hub with one repository, org/model; it writes down which files are asked for."""

    config: dict[str, Any]
    asked: set[str]

    def do_GET(self) -> None:
        self._reply(body=True)

    def do_HEAD(self) -> None:
        self._reply(body=False)

    def _reply(self, *, body: bool) -> None:
        self.asked.add(self.path.split("/main/")[-1])
        found = self.path == "/org/model/resolve/main/config.json"
        content = json.dumps(self.config).encode() if found else b"{}"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_ConfigHub]]:
    from huggingface_hub import constants

    handler = type("Handler", (_ConfigHub,), {"config": dict(LLAMA_8B), "asked": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def _card(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A CUDA card with ``free`` bytes, as far as asking for it goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])


def _cuda_build(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A torch that is built for CUDA and cannot use it."""

    def init() -> None:
        raise RuntimeError(fault)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _project(folder: Path, base: str | Path, also: str = "") -> Path:
    project = tiny_project(folder / "project", Path(base), count=80)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("float32", "bfloat16").replace("epochs: 2", f"epochs: 1{also}"))
    assert command("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    return project


def _refused(ran: Ran, *words: str) -> None:
    message = " ".join(ran.stderr.split())
    assert ran.code == 2, message
    assert message.count("Error: ") == 1, message
    for each in words:
        assert each in message


@pytest.mark.parametrize("arguments", [["train"], ["run"], ["train", "--sweep"], ["train", "--curve"], ["crossval"]])
def test_command_refuses_base_before_fetching_weights_when_card_is_too_small(
    arguments: list[str], hub: type[_ConfigHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _project(tmp_path, "org/model")
    _card(monkeypatch, 12 * GB)
    _refused(
        command(*arguments, "-p", project),
        "org/model needs at least 16",
        "12.0 GB free on this machine's",
        "Set train.quantization: nf4, which needs 6.",
        "fits rows of up to",
    )
    assert hub.asked == {"config.json"}


FAULTS = [
    (
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "The NVIDIA driver on your system is too old (found version 11040)",
    ),
    (
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
        "Found no NVIDIA driver on your system",
    ),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_train_refuses_large_base_when_cuda_build_has_no_usable_card(
    fault: str, message: str, hub: type[_ConfigHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _project(tmp_path, "org/model")
    _cuda_build(monkeypatch, fault)
    _refused(
        command("train", "-p", project),
        f"torch is built for CUDA but cannot use a card: {message}",
        "set CUDA_VISIBLE_DEVICES=-1",
    )
    assert hub.asked == {"config.json"}


@pytest.mark.parametrize(
    ("fault", "vendor", "warned"),
    [(FAULTS[1], "0x10de", True), (FAULTS[1], "0x8086", False), (FAULTS[0], "0x1414", True)],
    ids=["with a card", "without", "with a driver"],
)
def test_train_warns_when_cuda_build_cannot_use_the_card_that_is_there(
    fault: tuple[str, str],
    vendor: str,
    warned: bool,
    tmp_path: Path,
    tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = _project(tmp_path, tiny_base_folder)
    _cuda_build(monkeypatch, fault[0])
    (tmp_path / "devices" / "0000:00:01.0").mkdir(parents=True)
    (tmp_path / "devices" / "0000:00:01.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr("tunewright.training.memory._DEVICES", tmp_path / "devices")
    ran = command("train", "-p", project)
    assert ran.code == 0, ran.stderr
    message = " ".join(ran.stderr.split())
    assert (f"{fault[1]}. Training runs on the CPU." in message) is warned
    assert ("CUDA" in message) is warned


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be opened as a causal decoder"),
        ({"architectures": ["NextYearForCausalLM"]}, "has no NextYearForCausalLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
    ],
)
def test_train_refuses_base_by_its_config_before_fetching_weights(
    values: dict[str, Any], words: str, hub: type[_ConfigHub], tmp_path: Path
) -> None:
    hub.config = values
    project = _project(tmp_path, "org/model")
    _refused(command("train", "-p", project), words)
    assert hub.asked == {"config.json"}
