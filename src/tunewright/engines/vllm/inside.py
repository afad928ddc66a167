"""What runs inside vLLM's own processes: which adapters it may load, and which routes it answers.

vLLM has an environment of its own, so this imports nothing of tunewright; :mod:`tunewright.engines.vllm.launch`
copies it into the child's private folder as the package ``tunewright_vllm``.

vLLM's own two resolvers take the name that a client sends for a path or for the name of a repository, and the variable
that switches resolvers on also opens routes which load any folder. So here a name is looked up in a list and nowhere
else, and of all routes only those that the gateway uses are there.
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
"""The environment variable that names the list: digests to ``{"path": folder, "files": {name: SHA-256}}``, and of an
adapter with a manifest ``"manifest"``: the SHA-256 of the one whose signatures the gateway has checked."""
GATEWAY = "TUNEWRIGHT_GATEWAY"
"""The environment variable that names the process that starts vLLM."""
SIGNED = "manifest.json"
"""In an adapter's folder: every file's digest, which signatures are over."""
EVICT = "/tunewright/adapters/"
ROUTES = frozenset({("GET", "/health"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")})

log = logging.getLogger("vllm.tunewright")


def register() -> None:
    """The entry point of ``vllm.general_plugins``; vLLM calls it in each of its processes."""
    _end_with_parent()
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class ListedAdapters(LoRAResolver):  # type: ignore[misc]  # where types are checked there is no vLLM
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:  # noqa: ARG002
            path = await asyncio.to_thread(listed, Path(os.environ[MANIFEST]), lora_name)
            # vLLM numbers the adapter itself.
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

    LoRAResolverRegistry.register_resolver("tunewright", ListedAdapters())


def listed(manifest: Path, digest: str) -> str | None:
    """The folder of the adapter with this digest; None if it is not listed, or its files are not the listed ones.

    Where it has a manifest, that has to be the one that was listed, and the files that vLLM loads are held to what is
    written in it.
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


class Gate:
    """ASGI middleware: the routes that the gateway uses, and one that lets an adapter go; the rest is not there."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, evict, or answer 404."""
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
        """Free the adapter's slot: vLLM's own route for it forgets the name, and leaves the weights where they are."""
        models = state.openai_serving_models
        async with models.lora_resolver_lock[digest]:
            request = models.lora_requests.pop(digest, None)
            if request is not None:
                await state.engine_client.remove_lora(request.lora_int_id)


async def _answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it dies, however that dies (PR_SET_PDEATHSIG).

    A request to end would not reach one that hangs.
    """
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    leads = os.getsid(0) == os.getpid()  # vLLM's first process; the others are started by it
    if leads and os.getppid() != int(os.environ[GATEWAY]):
        os._exit(1)  # it had died before it could be asked for
