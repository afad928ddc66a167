"""vLLM's start and requests, with a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from making.fake_vllm import ENDLESS
from making.otlp_collector import traced
from making.vllm_child import alive, ids, seen, settings, wait_until
from tunewright.adapters.registry import write_manifest
from tunewright.config import Config, EngineName, ServeConfig
from tunewright.core import tracing
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest, write_json
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.environment import Build, Environment
from tunewright.engines.protocol import RequestFailedError
from tunewright.engines.vllm import worker
from tunewright.engines.vllm.engine import VllmEngine, plan
from tunewright.generation.requests import Request
from tunewright.serving.engine_start import max_num_seqs

pytest_plugins = ["making.vllm_child"]


def test_settings_have_one_spare_slot_and_round_ranks_up(tmp_path: Path) -> None:
    assert [settings(tmp_path, room=room).slots for room in (1, 7)] == [2, 8]
    assert [settings(tmp_path, max_rank=rank).allowed_rank for rank in (1, 4, 16, 17, 257)] == [1, 8, 16, 32, 320]
    options = settings(tmp_path, room=7, max_rank=17).options()
    message = dict(pairwise(options))
    assert (message["--max-loras"], message["--max-cpu-loras"], message["--max-lora-rank"]) == ("8", "8", "32")


def test_socket_is_private_and_only_the_gateways_routes_are_open(engine: VllmEngine) -> None:
    assert stat.S_IMODE(engine.child.folder.stat().st_mode) == 0o700
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.child.socket)), base_url="http://vllm") as client:
        for path in (
            "/v1/load_lora_adapter",
            "/adapters",
            "/invocations",
            "/docs",
            "/v1/models/",
            "/health/../adapters",
        ):
            assert {client.get(path).status_code, client.post(path, json={}).status_code} <= {404}
        assert client.get("/health").status_code == 200


def test_folder_for_temporary_files_that_is_too_long_for_a_socket_is_refused(
    tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 107)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(UserError, match="at most 107 bytes") as refused:
        VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())
    assert refused.value.where == "TMPDIR"
    assert list(long.iterdir()) == []


def test_vllm_variables_of_the_caller_are_not_inherited(
    tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", "/")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    engine = VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())
    try:
        inherited = seen(engine)["environment"]
    finally:
        engine.stop()
    ours = {name for name in inherited if name.startswith("VLLM_")}
    assert ours == {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_NO_USAGE_STATS",
        "VLLM_PLUGINS",
    }
    assert inherited["VLLM_PLUGINS"] == "tunewright_vllm", "and not vLLM's own resolvers"
    assert "RAY_AUTH_TOKEN" not in inherited


def test_vllm_traces_to_the_same_collector_and_continues_the_engines_span(
    tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(engine: VllmEngine) -> None:
        with tracing.span("engine"):
            await ids(engine, Request((1,), None, 2))

    with traced(monkeypatch) as collector:
        engine = VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())
        try:
            asyncio.run(ask(engine))
            found = seen(engine)
        finally:
            engine.stop()
    options = found["options"]
    assert options[options.index("--otlp-traces-endpoint") + 1] == f"{collector.url}/v1/traces"
    assert found["environment"]["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert found["environment"]["OTEL_SERVICE_NAME"] == "vllm"
    span = collector.one("engine")
    assert found["traceparent"].rpartition("-")[0] == f"00-{span.trace}-{span.id}"


def test_request_has_a_cache_salt_per_tenant_and_all_sampling_settings(
    engine: VllmEngine,
) -> None:
    salts = []
    for tenant in ("a", "b", "a"):
        request = Request((5, 6), None, 3, temperature=0.5, top_p=0.9, seed=7)
        assert asyncio.run(ids(engine, request, tenant)) == [1, 2, 3]
        body = seen(engine)["body"]
        salts.append(body.pop("cache_salt"))
    assert salts[0] == salts[2] != salts[1]
    assert len(salts[0]) == 64 and salts[0] != "a"
    assert body == {
        "model": "base",
        "prompt": [5, 6],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop_token_ids": [0],
        "ignore_eos": True,
        "add_special_tokens": False,
        "stream": True,
        "return_token_ids": True,
    }


def test_adapters_are_listed_loaded_and_evicted_up_to_the_room(
    engine: VllmEngine, small_adapters: dict[str, Path]
) -> None:
    (one, first), (two, second), (three, third) = small_adapters.items()

    async def load() -> None:
        await engine.load(one, first)
        await engine.load(two, second)
        with pytest.raises(UserError, match="room for 2 adapters"):
            await engine.load(three, third)
        await engine.unload(one)
        await engine.load(three, third)
        assert await ids(engine, Request((5,), three, 2)) == [1, 2]
        with pytest.raises(RequestFailedError, match="not loaded"):
            await ids(engine, Request((5,), one, 2))

    asyncio.run(load())
    assert len(seen(engine)["evicted"]) == 1
    manifest = json.loads((engine.child.folder / "adapters.json").read_text())
    assert {digest: entry["path"] for digest, entry in manifest.items()} == {two: str(second), three: str(third)}


def test_resolver_looks_names_up_and_never_takes_them_for_paths(
    tmp_path: Path, small_adapters: dict[str, Path]
) -> None:
    digest, folder = next(iter(small_adapters.items()))
    from tunewright.core.io import file_digest

    files = {name: file_digest(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    manifest = tmp_path / "adapters.json"
    manifest.write_text(json.dumps({digest: {"path": str(folder), "files": files}}))
    assert worker.listed(manifest, digest) == str(folder)
    for name in (
        str(folder),
        f"../{folder.name}",
        folder.name,
        digest[:12],
        digest.upper(),
        "",
        "meta-llama/Llama-3.1-8B",
    ):
        assert worker.listed(manifest, name) is None
    changed = {**files, "adapter_config.json": "0" * 64}
    manifest.write_text(json.dumps({digest: {"path": str(folder), "files": changed}}))
    assert worker.listed(manifest, digest) is None


def test_resolver_checks_files_against_the_admitted_manifest(
    tmp_path: Path, engine: VllmEngine, small_adapters: dict[str, Path]
) -> None:
    digest, source = next(iter(small_adapters.items()))
    folder = tmp_path / "signed-one"
    shutil.copytree(source, folder)
    write_json(folder / "lineage.json", {"digest": digest, "created": "2026-11-25T12:00:00+00:00"})
    write_manifest(folder, "signed-one")
    asyncio.run(engine.load(digest, folder))
    manifest = engine.child.folder / "adapters.json"
    assert json.loads(manifest.read_text())[digest]["manifest"] == file_digest(folder / "manifest.json")
    assert worker.listed(manifest, digest) == str(folder.resolve())

    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-1] + b"\x7f")
    assert worker.listed(manifest, digest) is None, "the file has changed"
    # Nor does it help to change the manifest with it.
    write_manifest(folder, "signed-one")
    assert worker.listed(manifest, digest) is None
    asyncio.run(engine.unload(digest))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="The manifest does not match"):
        asyncio.run(engine.load(digest, folder))


def test_failed_start_reports_vllms_log(tmp_path: Path, orders: Path) -> None:
    orders.write_text("no kernel image is available for execution")
    with pytest.raises(UserError, match="no kernel image is available"):
        VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())


def test_aborted_request_is_aborted_in_vllm(engine: VllmEngine) -> None:
    async def hang_up() -> None:
        stream = engine.stream(Request((ENDLESS,), None, 500))
        await anext(stream)
        await stream.aclose()

    asyncio.run(hang_up())
    wait_until(lambda: seen(engine)["hung_up"] == 1)
    assert engine.in_flight == (0, 0)


def test_process_of_vllm_ends_with_its_parent_before_plugins_are_loaded(tmp_path: Path) -> None:
    code = """
import multiprocessing, time
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
child.start()
print(child.pid, flush=True)
child.join()
"""
    variables = plan(tmp_path, Path(sys.executable), [], {}).variables
    vllm = subprocess.Popen(
        [sys.executable, "-c", code], env=dict(variables), start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert vllm.stdout is not None
    child = int(vllm.stdout.readline())
    vllm.kill()
    vllm.communicate()
    wait_until(lambda: not alive(child))


@pytest.mark.parametrize(
    ("engine", "build", "card", "expected"),
    [
        ("peft", "cuda", 80 << 30, 16),
        ("llamacpp", "cuda", 80 << 30, 16),
        ("vllm", "cpu", None, 16),
        ("vllm", "cuda", 24 << 30, 128),
        ("vllm", "cuda", 80 << 30, 256),
        ("vllm", "cuda", None, 128),  # torch here is built without CUDA, vLLM's own is not
    ],
)
def test_max_num_seqs_is_the_engines_default_when_the_config_has_none(
    engine: EngineName, build: Build, card: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Environment("vllm", Path("vllm"), build, {})
    monkeypatch.setattr(environment, "find", lambda tool: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=card))
    assert max_num_seqs(engine, Config()) == expected
    assert max_num_seqs(engine, Config(serve=ServeConfig(max_num_seqs=3))) == 3


@pytest.mark.parametrize(
    ("cpu", "room", "on_gpu", "expected"),
    [
        (True, 40, None, (41, 41)),
        (True, 40, 16, (41, 41)),
        (False, 40, None, (41, 41)),
        (False, 40, 16, (16, 40)),
        (False, 3, 16, (3, 3)),
    ],
)
def test_vllm_gets_a_slot_for_each_adapter_unless_the_gpu_is_limited(
    cpu: bool, room: int, on_gpu: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    """The build for the CPU takes the last slot for the base, so there one slot always stays empty."""
    options = replace(settings(tmp_path, room=room, gpu_adapters=on_gpu), cpu=cpu).options()
    found = dict(pairwise(options))
    assert (int(found["--max-loras"]), int(found["--max-cpu-loras"])) == expected
