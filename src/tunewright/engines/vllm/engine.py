"""The engine ``vllm``: its start with our plugin in a private folder, and its requests from the gateway's process."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import secrets
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tunewright.adapters.lora_weights import CONFIG, WEIGHTS, vllm_refusals
from tunewright.adapters.manifest import MANIFEST, Manifest, parse_record
from tunewright.adapters.registry import require_digest
from tunewright.core import tracing
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.processes import last_lines
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child, Plan, refusal, socket_in
from tunewright.engines.protocol import (
    Delta,
    EngineStoppedError,
    RequestFailedError,
    TokenSink,
    checked,
    deliver_stream,
)
from tunewright.engines.vllm import worker
from tunewright.generation.requests import Finish, Request, TokenLogprob
from tunewright.models import ALLOCATOR

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The valid values of ``--max-lora-rank`` (vLLM 0.32, MaxLoRARanks in vllm/config/lora.py)."""
BASE = "base"
"""The base's name on the socket; adapters are named by their digests, which are longer."""
_CRASHED = "vLLM crashed and is restarting."
GPU_BATCHED_TOKENS = 2048
"""vLLM 0.32's lowest default for a pass on a card (EngineArgs.get_batch_defaults); an H100 computes 8,192."""
CPU_BATCHED_TOKENS = 512
"""Tokens of a pass without a GPU, where vLLM gathers a copy of the LoRA weights for each token. 2,048 tokens at rank 64
would take 3.5 GiB for an 8B base."""


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM.

    Args:
        cpu: whether it is the build without a GPU.
        room: the number of adapters that can be loaded at once, at least 1.
        max_rank: the highest LoRA rank of any adapter that will be loaded.
        kv_cache_bytes: the size of the key/value cache, which also limits the context; None: vLLM decides.
        gpu_share: the share of the GPU's memory that it may take; None means vLLM's 0.9.
        gpu_adapters: the most adapters on the GPU at once; None: all. It has no effect without a GPU.
        vision: whether the base can read images. This is turned off, so that its vision tower takes no memory.
    """

    python: Path
    cpu: bool
    base: Path
    dtype: str
    room: int
    max_rank: int
    max_num_seqs: int
    kv_cache_bytes: int | None = None
    gpu_share: float | None = None
    gpu_adapters: int | None = None
    vision: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """``--max-loras``: the maximum number of adapters plus one, or `gpu_adapters`.

        vLLM marks a row without an adapter by -1, and without a GPU takes the weights of the *last* slot for it. So in
        a batch with a tenant's request, a request for the base would be answered with the adapter in that slot. Slots
        are filled from the first one on, and an unloaded adapter frees its slot, so the spare one stays empty.
        """
        return self.room + 1 if self.cpu or self.gpu_adapters is None else min(self.room, self.gpu_adapters)

    @property
    def allowed_rank(self) -> int:
        """``--max-lora-rank``: the lowest rank that fits all adapters; a higher rank costs memory and time."""
        return next(rank for rank in RANKS if rank >= self.max_rank)

    def options(self) -> list[str]:
        """Return the command line of vLLM's API server."""
        options: dict[str, object] = {
            "--model": self.base,
            "--served-model-name": BASE,
            "--dtype": self.dtype,
            "--load-format": "safetensors",
            "--max-model-len": "auto",
            "--max-num-seqs": self.max_num_seqs,
            "--max-loras": self.slots,
            "--max-cpu-loras": max(self.room, self.slots),
            "--max-lora-rank": self.allowed_rank,
            # Constraints are rules of llguidance, as in the embedded engine.
            "--structured-outputs-config": json.dumps({"backend": "guidance"}),
            "--generation-config": "vllm",  # without the base's defaults, which would add to the request's sampling
            "--middleware": f"{PACKAGE}.RouteFilter",
        }
        if self.cpu:
            options["--max-num-batched-tokens"] = max(CPU_BATCHED_TOKENS, self.max_num_seqs)
        if self.gpu_share is not None:
            options["--gpu-memory-utilization"] = self.gpu_share
        if self.vision:
            options["--limit-mm-per-prompt"] = json.dumps({"image": 0})
        if self.kv_cache_bytes is not None:
            options["--kv-cache-memory-bytes"] = self.kv_cache_bytes
        flags = ["--enable-lora", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
        return [*flags, *(str(part) for pair in options.items() for part in pair)]


class VllmEngine:
    """vLLM in a child process."""

    name = "vllm"
    unsupported: frozenset[str] = frozenset()

    def __init__(self, settings: VllmSettings, *, stop_ids: Collection[int], reporter: Reporter) -> None:
        self.max_num_seqs = settings.max_num_seqs
        self.prefill_tokens = CPU_BATCHED_TOKENS if settings.cpu else GPU_BATCHED_TOKENS
        self._settings = settings
        self._stop_ids = sorted(stop_ids)
        self._listed: dict[str, dict[str, Any]] = {}
        self._running = 0
        self._secret = secrets.token_bytes(32)
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if settings.cpu else {}
        variables |= settings.variables
        options, traces = settings.options(), tracing.endpoint()
        if traces is not None:  # vLLM's spans are children of the gateway's spans
            options += ["--otlp-traces-endpoint", traces]
            variables |= tracing.variables_of("vllm")
        self.child = Child(
            lambda folder: plan(folder, settings.python, options, variables),
            lambda: self._running > 0,
            reporter,
        )
        transport = httpx.HTTPTransport(uds=str(self.child.socket))
        with httpx.Client(transport=transport, base_url="http://vllm", timeout=30) as client:
            models = client.get("/v1/models").raise_for_status().json()["data"]
        self.context_length = int(models[0]["max_model_len"])

    @property
    def stopped(self) -> str | None:
        return self.child.failure_reason

    @property
    def permanently_stopped(self) -> bool:
        return self.child.given_up

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of requests at the engine, and 0: only vLLM knows which of them wait."""
        return self._running, 0

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`.

        Prefixes are shared between requests of one tenant only. Otherwise a tenant could tell by the time to the first
        token which prompts another one has sent (CVE-2025-46570).
        """
        return deliver_stream(checked(self.stream(request, tenant=tenant), request), sink)

    async def stream(
        self, request: Request, *, tenant: str = "", stop_ids: Collection[int] | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yield a request's deltas; closing the generator early also ends the request in vLLM."""
        ends = self._stop_ids if stop_ids is None else stop_ids
        async with self._post(request, {**self._body(request, ends, tenant), "stream": True}) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                delta = _delta(_only_choice(json.loads(line.removeprefix("data: "))), ends)
                if delta.ids or delta.finish:
                    yield delta
                if delta.finish:
                    return
            raise EngineStoppedError("vLLM ended an answer before it was complete.")

    async def answer(self, request: Request, stop_ids: Collection[int], *, tenant: str = "") -> Delta:
        """Return the complete answer from one reply, which costs this process far less than an event per token."""
        async with self._post(request, self._body(request, stop_ids, tenant)) as reply:
            choice = _only_choice(json.loads(await reply.aread()))
            if tuple(choice["prompt_token_ids"]) != request.prompt_ids:
                raise RequestFailedError("vLLM got other token ids than were sent.")
            return _delta(choice, stop_ids)

    @asynccontextmanager
    async def _post(self, request: Request, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the reply; the request counts as running until the block ends."""
        assert not request.stop, "the caller handles stop strings"
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        if request.adapter is not None and request.adapter not in self._listed:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        self._running += 1
        try:
            async with self.child.post("/v1/completions", body, tracing.headers()) as reply:
                if reply.status_code != 200:
                    raise RequestFailedError(refusal("vLLM", await reply.aread()))
                yield reply
        except httpx.TransportError as error:
            raise EngineStoppedError(self.stopped or _CRASHED) from error
        except RequestFailedError as error:
            # After a crash of vLLM's core process every request fails, and none is at fault.
            if await self.child.is_healthy():
                raise
            raise EngineStoppedError(self.stopped or _CRASHED) from error
        finally:
            self._running -= 1

    async def load(self, digest: str, folder: Path) -> None:
        """Add an adapter to the list, and load it into vLLM."""
        if digest in self._listed:
            return
        self._require_room(folder)
        await asyncio.to_thread(require_digest, folder, digest)
        self._listed[digest] = await asyncio.to_thread(_entry, digest, folder)
        list_adapters(self.child.folder, self._listed)
        try:
            async for _ in self.stream(Request((self._stop_ids[0] if self._stop_ids else 0,), digest, 1)):
                pass
        except RequestFailedError as error:
            await self.unload(digest)
            raise UserError(f"vLLM cannot load it: {self._load_error(digest) or error}", where=str(folder)) from error

    async def unload(self, digest: str) -> None:
        """Take an adapter that no running request needs off the list and out of its slot."""
        if self._listed.pop(digest, None) is None:
            return
        list_adapters(self.child.folder, self._listed)
        try:
            (await self.child.client().delete(f"{worker.EVICT}{digest}")).raise_for_status()
        except httpx.TransportError as error:
            raise EngineStoppedError(_CRASHED) from error

    def stop(self) -> None:
        self.child.stop()

    def _body(self, request: Request, stop_ids: Collection[int], tenant: str) -> dict[str, Any]:
        body = {
            "model": request.adapter or BASE,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # only stop_token_ids end an answer
            "add_special_tokens": False,
            "return_token_ids": True,
            "cache_salt": hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest(),
        }
        if request.temperature > 0 and request.seed is not None:
            body["seed"] = request.seed
        if request.presence_penalty or request.frequency_penalty:
            body |= {"presence_penalty": request.presence_penalty, "frequency_penalty": request.frequency_penalty}
        if request.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias}
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        if request.constraint is not None:
            body["structured_outputs"] = {"grammar": request.constraint.rules}
        return body

    def _require_room(self, folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for what in vllm_refusals(config).values():
            raise UserError(f"vLLM does not support {what}", where=str(folder))
        rank = adapter_rank(config)
        if rank > self._settings.allowed_rank:
            raise UserError(
                f"The adapter's rank is {rank}, and vLLM was started for ranks up to {self._settings.allowed_rank}",
                where=str(folder),
                fix="Restart the server: it reads the ranks of the stored adapters.",
            )
        if len(self._listed) >= self._settings.room:
            raise UserError(
                f"vLLM was started with room for {self._settings.room} adapters, and all of it is used",
                where=str(folder),
                fix="Raise serve.spare_adapters or undeploy an alias, then restart the server.",
            )

    def _load_error(self, digest: str) -> str | None:
        """Return the reason in vLLM's log why it did not load an adapter."""
        for line in reversed(last_lines(self.child.log, 200).splitlines()):
            if digest in line and "Failed to load" in line:
                return line.partition("ListedAdapters: ")[2].removesuffix(" Trying next resolver.") or line
        return None


def _only_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the only choice of a reply or an event."""
    if "error" in reply:
        raise RequestFailedError(f"vLLM could not compute this request: {reply['error'].get('message')}")
    (choice,) = reply["choices"]
    return dict(choice)


def _delta(choice: Mapping[str, Any], stop_ids: Collection[int]) -> Delta:
    """Return a choice's tokens without the token that ended it."""
    ids = tuple(choice["token_ids"] or ())
    finish = choice["finish_reason"]
    if finish not in (None, "stop", "length"):
        raise RequestFailedError(f"vLLM ended this request early ({finish}).")
    if finish == "stop" and ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    ended: Finish | None = finish
    return Delta(ids, ended, _logprobs(choice)[: len(ids)])


def _logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """Return the log probabilities of a choice's tokens, which are named ``token_id:ID``; empty if it has none.

    vLLM adds the chosen token to the likeliest tokens, if it is not one of them.
    """
    reported = choice.get("logprobs")
    if not reported:
        return ()
    found = []
    for logprob, top in zip(reported["token_logprobs"], reported["top_logprobs"] or (), strict=True):
        likeliest = sorted(((int(name.partition(":")[2]), value) for name, value in top.items()), key=lambda t: -t[1])
        found.append(TokenLogprob(logprob, tuple(likeliest)))
    return tuple(found)


def _entry(digest: str, folder: Path) -> dict[str, Any]:
    """Return the entry that vLLM's resolver checks an adapter against: see :data:`.worker.MANIFEST`."""
    entry: dict[str, Any] = {
        "path": str(folder.resolve()),
        "files": {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    if (folder / MANIFEST).exists():
        text = (folder / MANIFEST).read_bytes()
        manifest = parse_record(Manifest, text, str(folder / MANIFEST))
        listed = {name: manifest.files[name].sha256 for name in entry["files"] if name in manifest.files}
        if manifest.digest != digest or listed != entry["files"]:
            raise UserError("The manifest does not match the adapter's files", where=str(folder / MANIFEST))
        entry["manifest"] = hashlib.sha256(text).hexdigest()
    return entry


def adapter_rank(config: Mapping[str, Any]) -> int:
    """Return the highest rank in an adapter's configuration."""
    return max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])


def max_rank(folders: Sequence[Path]) -> int:
    """Return the highest rank of these adapters, at least 1."""
    configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in folders]
    return max([1, *map(adapter_rank, configs)])


def kv_cache_bytes(config: Mapping[str, Any], dtype: str, max_num_seqs: int) -> int:
    """Return the bytes of a small key/value cache without a GPU: a context or 2,048 tokens per row; at most 4 GiB."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    per_token *= 4 if dtype == "float32" else 2
    tokens = max(config["max_position_embeddings"], 2048 * max_num_seqs)
    # In blocks of 128 tokens, with one more per row, since each row's last block is not full.
    return min(4 << 30, int(math.ceil(tokens / 128 + max_num_seqs + 1) * 128 * per_token))


PACKAGE = "tunewright_vllm"

# Python runs this code first. A process that vLLM starts imports for many seconds before it loads plugins, and would
# outlive a parent that is killed meanwhile. Python's resource tracker has to outlive it, to free its shared memory.
_FIRST = f"""\
import sys

if "--multiprocessing-fork" in sys.orig_argv:
    import {PACKAGE}

    {PACKAGE}.end_with_parent()
"""

# Not inherited: vLLM's switches (one switch makes it answer unknown names with the base), Python's
# search paths, and the token of a Ray cluster.
_NOT_INHERITED = ("VLLM_", "PYTHON", "VIRTUAL_ENV", "LORA_", "RAY_")


def plan(folder: Path, python: Path, options: Sequence[str], variables: Mapping[str, str]) -> Plan:
    """Return the plan of vLLM's API server on the socket of a private folder, without any adapter."""
    list_adapters(folder, {})
    _write_plugin(folder / "site")
    # The allocator's setting is for training; vLLM reserves its memory at once.
    environment = [each for each in os.environ.items() if each != ALLOCATOR]
    inherited = {name: value for name, value in environment if not name.startswith(_NOT_INHERITED)}
    ours = {
        "PYTHONPATH": str(folder / "site"),
        worker.MANIFEST: str(_manifest(folder)),
        worker.GATEWAY: str(os.getpid()),
        "VLLM_PLUGINS": PACKAGE,  # without vLLM's own resolvers
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # resolvers need it; it also opens routes, which the gate closes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket_in(folder))]
    return Plan("vLLM", [*server, *options], {**inherited, **ours, **variables}, "vllm:")


def list_adapters(folder: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    """Write the list of adapters that vLLM may load: see :data:`tunewright.engines.vllm.worker.MANIFEST`."""
    manifest = _manifest(folder)
    fresh = manifest.with_suffix(".new")
    fresh.write_text(json.dumps(dict(entries)), encoding="utf-8")
    fresh.replace(manifest)


def _manifest(folder: Path) -> Path:
    return folder / "adapters.json"


def _write_plugin(site: Path) -> None:
    """Write the package that vLLM finds by its entry point, and what Python runs first."""
    package, info = site / PACKAGE, site / f"{PACKAGE}-1.dist-info"
    package.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(_FIRST, encoding="utf-8")
    info.mkdir()
    shutil.copyfile(worker.__file__, package / "__init__.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1\n", encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{PACKAGE} = {PACKAGE}:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")
