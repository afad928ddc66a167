"""The child process: llama.cpp's server on a Unix socket, until its standard input ends.

Usage: python -m tunewright.serving.engines.llamacpp.inside SETTINGS, a JSON object (see :func:`main`). A file that
llama.cpp cannot take may end the process (``GGML_ASSERT``): it must not be the gateway's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any


def main(told: str) -> None:
    """Serve.

    Args:
        told: ``model`` (a file), ``loras`` (files), ``socket``, ``rows``, ``tokens`` (of the key/value cache),
            ``threads``.
    """
    _end_with_parent()
    import xllamacpp

    settings: dict[str, Any] = json.loads(told)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames = [settings["socket"]]
    params.n_ctx = settings["tokens"]
    params.fit_params = False  # it would shrink the context without a word
    params.n_parallel = settings["rows"]
    params.kv_unified = True  # a long row may have what short ones leave
    params.n_threads_http = settings["rows"] + 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.use_jinja = False
    params.ui = False
    params.endpoint_slots = False
    params.endpoint_metrics = True  # whether it computes at all
    # Adapters are loaded and not applied: each request says which.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["loras"]]
    params.lora_init_without_apply = True
    # Nothing of a request is kept for another one: the cache of prompts does not know adapters (llama.cpp issue
    # 26207), nor tenants.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.n_cache_reuse = 0
    params.slot_prompt_similarity = 0.0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(f"{error}")  # its log, before this, says why
    sys.stdout.write(f"llama.cpp serves at {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


def _end_with_parent() -> None:
    """End when whoever started this has died, however that was; it may do so while the model is being read."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if sys.platform == "linux":
        # A process that hangs reads nothing any more: Linux kills it (PR_SET_PDEATHSIG).
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _end_with_stdin() -> None:
    # Not through sys.stdin, whose lock Python would wait for at its own end.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
