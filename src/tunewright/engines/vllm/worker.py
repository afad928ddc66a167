"""The plugin in vLLM's processes: it restricts the adapters that vLLM may load, and the routes that it answers.

vLLM runs in a separate environment, so this module imports nothing of tunewright. :mod:`.engine` copies it into the
child's private folder as the package ``tunewright_vllm``.

vLLM's own two resolvers interpret the name in a request as a path or a repository. The variable
that turns resolvers on also opens routes that load any folder. So this resolver looks names up only
in a list, and a gate closes all routes except the gateway's.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

MANIFEST = "TUNEWRIGHT_VLLM_MANIFEST"
"""The environment variable with the path of the list: digests to ``{"path": folder, "files": {name: SHA-256}}``. An
adapter with a manifest also has ``"manifest"``, the SHA-256 of the manifest whose signatures the gateway checked."""
GATEWAY = "TUNEWRIGHT_GATEWAY"
"""The environment variable with the id of the process that starts vLLM."""
SIGNED = "manifest.json"
"""The file in an adapter's folder with the digests of all files, which signatures cover."""
EVICT = "/tunewright/adapters/"
ROUTES = frozenset({("GET", "/health"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")})

log = logging.getLogger("vllm.tunewright")


def register() -> None:
    """Register the resolver: the entry point of ``vllm.general_plugins``, called in each of vLLM's processes."""
    end_with_parent()
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class ListedAdapters(LoRAResolver):  # type: ignore[misc]  # where types are checked there is no vLLM
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:  # noqa: ARG002
            path = await asyncio.to_thread(listed, Path(os.environ[MANIFEST]), lora_name)
            # vLLM sets its own number.
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

    LoRAResolverRegistry.register_resolver("tunewright", ListedAdapters())


def listed(manifest: Path, digest: str) -> str | None:
    """Return the folder of an adapter; None if it is not listed, or its files have changed.

    If the adapter has a manifest, it must be the listed one, and the files that vLLM loads must match it.
    """
    entry = json.loads(manifest.read_text(encoding="utf-8")).get(digest)
    if entry is None:
        return None
    folder = Path(entry["path"])
    expected: dict[str, str] = entry["files"]
    if "manifest" in entry:
        text = (folder / SIGNED).read_bytes()
        if hashlib.sha256(text).hexdigest() != entry["manifest"]:
            log.error("adapter %s is refused: %s has changed", digest, folder / SIGNED)
            return None
        expected = {name: json.loads(text)["files"].get(name, {}).get("sha256") for name in expected}
    for name, sha256 in expected.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                log.error("adapter %s is refused: %s has changed", digest, folder / name)
                return None
    return str(folder)


class RouteFilter:
    """ASGI middleware: it forwards the gateway's routes, adds a route to evict an adapter, and refuses the rest."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, evict an adapter, or answer 404."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and (scope["method"], scope["path"]) in ROUTES):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "DELETE" and scope["path"].startswith(EVICT):
            await self._evict(scope["app"].state, scope["path"].removeprefix(EVICT))
            await _answer(send, 204)
        elif scope["type"] == "http":
            await _answer(send, 404)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _evict(self, state: Any, digest: str) -> None:
        """Free the adapter's slot; vLLM's own route only forgets the name, and leaves the weights in the slot."""
        models = state.openai_serving_models
        async with models.lora_resolver_lock[digest]:
            request = models.lora_requests.pop(digest, None)
            if request is not None:
                await state.engine_client.remove_lora(request.lora_int_id)


async def _answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends, however that ends (PR_SET_PDEATHSIG).

    A hanging process would not notice a request to stop.
    """
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if not _has_parent():
        os._exit(1)  # the parent ended before this process asked for the signal


def _has_parent() -> bool:
    """Return whether the process that started this one is still its parent."""
    session = os.getsid(0)
    if session == os.getpid():  # vLLM's first process, which starts the others
        return os.getppid() == int(os.environ[GATEWAY])
    try:
        return os.getsid(os.getppid()) == session
    except ProcessLookupError:
        return False
