"""The engine ``vllm`` as the gateway sees it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tunewright.adapters.manifest import MANIFEST, Manifest, parse_record
from tunewright.adapters.registry import require_digest
from tunewright.adapters.vllm_compat import CONFIG, WEIGHTS, vllm_refusals
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.progress import Reporter
from tunewright.engines.child import Child
from tunewright.engines.protocol import Delta, EngineStoppedError, RequestFailedError
from tunewright.engines.vllm import inside
from tunewright.engines.vllm.launch import PACKAGE, list_adapters, plan
from tunewright.generation.decoding import Finish, Request

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (vLLM 0.32, MaxLoRARanks in vllm/config/lora.py)."""
BASE = "base"
"""What the base is called on the socket; adapters are called by their digests, which are longer."""
_DIED = "vLLM has died while it answered and is being started again."
CPU_BATCHED_TOKENS = 512
"""Without a GPU vLLM gathers a copy of the LoRA weights for each token of a pass: 2,048 tokens at rank 64 take 3.5 GiB
for an 8B base."""


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started.

    Args:
        python: the interpreter of its environment.
        cpu: it is the build without a GPU.
        base: the base's folder.
        dtype: "bfloat16" or "float32".
        room: adapters that can be loaded at once, at least 1.
        max_rank: the highest LoRA rank of any adapter that will be loaded.
        max_batch: the most rows that decode at once.
        kv_cache_bytes: what the key/value cache may take (None: vLLM decides); the context is what fits into it.
        gpu_share: of the GPU's memory, what it may take (None: vLLM's 0.9).
        vision: the base can read images; it is started without that, so its vision tower takes no memory.
    """

    python: Path
    cpu: bool
    base: Path
    dtype: str
    room: int
    max_rank: int
    max_batch: int
    kv_cache_bytes: int | None = None
    gpu_share: float | None = None
    vision: bool = False

    @property
    def slots(self) -> int:
        """``--max-loras``: one more than there are adapters at the most.

        vLLM marks a row without an adapter by -1, and without a GPU it then takes the *last* slot's weights: a request
        for the base, beside a tenant's, is answered with the adapter that lies there. Slots are filled from the first
        on, so that one to spare stays empty; and whoever is unloaded leaves its slot.
        """
        return self.room + 1

    @property
    def allowed_rank(self) -> int:
        """``--max-lora-rank``: the lowest that holds them all; a higher one takes memory and time."""
        return next(rank for rank in RANKS if rank >= self.max_rank)

    def options(self) -> list[str]:
        """Return the command line of vLLM's API server."""
        options: dict[str, object] = {
            "--model": self.base,
            "--served-model-name": BASE,
            "--dtype": self.dtype,
            "--load-format": "safetensors",
            "--max-model-len": "auto",
            "--max-num-seqs": self.max_batch,
            "--max-loras": self.slots,
            "--max-cpu-loras": self.slots,
            "--max-lora-rank": self.allowed_rank,
            "--generation-config": "vllm",  # and not the base's defaults, which would add to what a request says
            "--middleware": f"{PACKAGE}.Gate",
        }
        if self.cpu:
            options["--max-num-batched-tokens"] = max(CPU_BATCHED_TOKENS, self.max_batch)
        if self.gpu_share is not None:
            options["--gpu-memory-utilization"] = self.gpu_share
        if self.vision:
            options["--limit-mm-per-prompt"] = json.dumps({"image": 0})
        if self.kv_cache_bytes is not None:
            options["--kv-cache-memory-bytes"] = self.kv_cache_bytes
        flags = ["--enable-lora", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
        return [*flags, *(str(part) for pair in options.items() for part in pair)]


class VllmEngine:
    """vLLM in a process of its own.

    Args:
        stop_ids: tokens that end an answer; they are not part of it.

    Raises:
        UserError: vLLM does not start.
    """

    name = "vllm"

    def __init__(self, settings: VllmSettings, *, stop_ids: Collection[int], reporter: Reporter) -> None:
        self.max_batch = settings.max_batch
        self._settings = settings
        self._stop_ids = sorted(stop_ids)
        self._listed: dict[str, dict[str, Any]] = {}
        self._running = 0
        self._secret = secrets.token_bytes(32)
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if settings.cpu else {}
        self.child = Child(
            lambda folder: plan(folder, settings.python, settings.options(), variables),
            lambda: self._running > 0,
            reporter,
        )
        self.context_length = self._ask_context()

    @property
    def stopped(self) -> str | None:
        """Why the engine answers nothing now, or None while it does."""
        return self.child.trouble

    @property
    def dead(self) -> bool:
        """True if vLLM has died too often to be started again."""
        return self.child.given_up

    @property
    def under_way(self) -> tuple[int, int]:
        """Requests at the engine, and 0: which of them decode only vLLM knows."""
        return self._running, 0

    async def stream(
        self, request: Request, *, whose: str = "", stop_ids: Collection[int] | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Tokens as they come; closing the iterator early ends the request in vLLM, too.

        Prefixes are shared among requests of one ``whose`` only, so that nobody can tell by the time to the first token
        what another one has asked (CVE-2025-46570).

        Args:
            request, whose: as every engine takes them.
            stop_ids: the tokens that end this answer (None: those of the engine).

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: vLLM has died, or is being started again.
        """
        ends = self._stop_ids if stop_ids is None else stop_ids
        async with self._asked(request, {**self._body(request, ends, whose), "stream": True}) as reply:
            async for line in reply.aiter_lines():
                delta = _streamed(line, ends)
                if delta is not None:
                    yield delta
                    if delta.finish:
                        return
            raise EngineStoppedError("vLLM has ended an answer before it was whole.")

    async def answer(self, request: Request, stop_ids: Collection[int], *, whose: str = "") -> Delta:
        """Return the whole answer in one reply, which costs this process far less than an event for each token.

        Raises:
            RequestFailedError: this request could not be computed, or vLLM read other token ids than it was given.
            EngineStoppedError: vLLM has died, or is being started again.
        """
        async with self._asked(request, self._body(request, stop_ids, whose)) as reply:
            choice = _only_choice(json.loads(await reply.aread()))
            if tuple(choice["prompt_token_ids"]) != request.prompt_ids:
                raise RequestFailedError("vLLM has read other token ids than it was given.")
            return _delta(choice, stop_ids)

    @asynccontextmanager
    async def _asked(self, request: Request, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """The reply to a request, which counts as running until the block ends."""
        assert request.constraint is None and not request.stop, "the caller looks for stop strings itself"
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        if request.adapter is not None and request.adapter not in self._listed:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        self._running += 1
        try:
            async with self.child.post("/v1/completions", body) as reply:
                if reply.status_code != 200:
                    raise RequestFailedError(_refusal(await reply.aread()))
                yield reply
        except httpx.TransportError as error:
            raise EngineStoppedError(self.stopped or _DIED) from error
        except RequestFailedError as error:
            # Where a process behind the one that we ask has died, each request fails, and none is at fault.
            if await self.child.is_well():
                raise
            raise EngineStoppedError(self.stopped or _DIED) from error
        finally:
            self._running -= 1

    async def load(self, digest: str, folder: Path) -> None:
        """List an adapter and have vLLM load it.

        Raises:
            UserError: there is no room for it, its files are not those of the digest, or vLLM does not load it.
            EngineStoppedError: vLLM has died, or is being started again.
        """
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
            raise UserError(f"vLLM does not load it: {self._why_not(digest) or error}", where=str(folder)) from error

    async def unload(self, digest: str) -> None:
        """Take an adapter off the list and out of its slot; no request under way may need it.

        Raises:
            EngineStoppedError: vLLM has died, or is being started again (the adapter is off the list all the same).
        """
        if self._listed.pop(digest, None) is None:
            return
        list_adapters(self.child.folder, self._listed)
        try:
            (await self.child.client().delete(f"{inside.EVICT}{digest}")).raise_for_status()
        except httpx.TransportError as error:
            raise EngineStoppedError("vLLM has died and is being started again.") from error

    def stop(self) -> None:
        """End vLLM; what is under way gets :class:`EngineStoppedError`."""
        self.child.stop()

    def _body(self, request: Request, stop_ids: Collection[int], whose: str) -> dict[str, Any]:
        body = {
            "model": request.adapter or BASE,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # what ends an answer is said by stop_token_ids alone
            "add_special_tokens": False,
            "return_token_ids": True,
            "cache_salt": hmac.new(self._secret, whose.encode(), hashlib.sha256).hexdigest(),
        }
        if request.temperature > 0 and request.seed is not None:
            body["seed"] = request.seed
        return body

    def _ask_context(self) -> int:
        transport = httpx.HTTPTransport(uds=str(self.child.socket))
        with httpx.Client(transport=transport, base_url="http://vllm", timeout=30) as client:
            return int(client.get("/v1/models").raise_for_status().json()["data"][0]["max_model_len"])

    def _require_room(self, folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for what in vllm_refusals(config).values():
            raise UserError(f"vLLM does not load {what}", where=str(folder))
        rank = adapter_rank(config)
        if rank > self._settings.allowed_rank:
            raise UserError(
                f"its rank is {rank}, and vLLM was started for ranks up to {self._settings.allowed_rank}",
                where=str(folder),
                fix="Start the server again: it looks at the ranks of the adapters that are there.",
            )
        if len(self._listed) >= self._settings.room:
            raise UserError(
                f"vLLM was started with room for {self._settings.room} adapters, and they are all loaded",
                where=str(folder),
                fix="Raise serve.spare_adapters or undeploy an alias, then start the server again.",
            )

    def _why_not(self, digest: str) -> str | None:
        """Return what vLLM's log says of an adapter that it did not load."""
        for line in reversed(self.child.said(200).splitlines()):
            if digest in line and "Failed to load" in line:
                return line.partition("ListedAdapters: ")[2].removesuffix(" Trying next resolver.") or line
        return None


def _streamed(line: str, stop_ids: Collection[int]) -> Delta | None:
    """Return what a line of the event stream brings; None if nothing."""
    if not line.startswith("data: {"):
        return None
    delta = _delta(_only_choice(json.loads(line.removeprefix("data: "))), stop_ids)
    return delta if delta.ids or delta.finish else None


def _only_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the one choice of a reply or an event.

    Raises:
        RequestFailedError: it holds an error instead.
    """
    if "error" in reply:
        raise RequestFailedError(f"vLLM could not compute this request: {reply['error'].get('message')}")
    (choice,) = reply["choices"]
    return dict(choice)


def _delta(choice: Mapping[str, Any], stop_ids: Collection[int]) -> Delta:
    """Return a choice's tokens without the one that ended it."""
    ids = tuple(choice["token_ids"] or ())
    finish = choice["finish_reason"]
    if finish not in (None, "stop", "length"):
        raise RequestFailedError(f"vLLM ended this request early ({finish}).")
    if finish == "stop" and ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    ended: Finish | None = finish
    return Delta(ids, ended)


def _entry(digest: str, folder: Path) -> dict[str, Any]:
    """Return what vLLM's resolver holds an adapter to: see :data:`tunewright.engines.vllm.inside.MANIFEST`.

    Raises:
        UserError: its manifest is not of these files.
    """
    entry: dict[str, Any] = {
        "path": str(folder.resolve()),
        "files": {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    if (folder / MANIFEST).exists():
        text = (folder / MANIFEST).read_bytes()
        manifest = parse_record(Manifest, text, str(folder / MANIFEST))
        told = {name: manifest.files[name].sha256 for name in entry["files"] if name in manifest.files}
        if manifest.digest != digest or told != entry["files"]:
            raise UserError("its manifest is not of these files", where=str(folder / MANIFEST))
        entry["manifest"] = hashlib.sha256(text).hexdigest()
    return entry


def adapter_rank(config: Mapping[str, Any]) -> int:
    """Return the highest rank of an adapter, by its configuration."""
    return max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])


def max_rank(folders: Sequence[Path]) -> int:
    """Return the highest rank of these adapters; 1 where there is none."""
    configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in folders]
    return max([1, *map(adapter_rank, configs)])


def kv_cache_bytes(config: Mapping[str, Any], dtype: str, max_batch: int) -> int:
    """A small key/value cache, for where there is no GPU: a whole context or 2,048 tokens for each row; 4 GiB at most.

    Args:
        config: of the base's text model.
    """
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    per_token *= 4 if dtype == "float32" else 2
    tokens = max(config["max_position_embeddings"], 2048 * max_batch)
    # Blocks are of 128 tokens; one more for each row, for the one that is not full.
    return min(4 << 30, int(math.ceil(tokens / 128 + max_batch + 1) * 128 * per_token))


def _refusal(body: bytes) -> str:
    """Return what an answer with an error says."""
    try:
        return f"vLLM refuses this request: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"vLLM refuses this request: {body[:500].decode(errors='replace')}"
