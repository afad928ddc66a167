"""The child process: llama.cpp's server, for engine and exports, until its standard input is closed.

Usage: python -m tunewright.engines.llamacpp_worker SETTINGS, a JSON object (see :func:`main`). llama.cpp may
end the process on a bad file (``GGML_ASSERT``), so it must not be the gateway's own.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from tunewright.core.processes import end_with_parent


def main(text: str) -> None:
    """Serve.

    Args:
        text: settings as JSON: ``model`` (a file), ``loras`` (files), ``host`` (a Unix socket, or an address for which
            it chooses a port), ``rows``, ``tokens`` (of the key/value cache), ``threads``. Optional: ``key``, which
            requests must have, and ``jinja``, to render the file's chat template.
    """
    end_with_parent()
    import xllamacpp

    settings: dict[str, Any] = json.loads(text)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames = [settings["host"]]
    params.port = 0
    params.api_keys = [settings["key"]] if "key" in settings else []
    params.n_ctx = settings["tokens"]
    params.fit_params = False  # llama.cpp would shrink the context silently
    params.n_parallel = settings["rows"]
    params.kv_unified = True  # a long row may use the cache that short ones leave
    params.n_threads_http = settings["rows"] + 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.use_jinja = settings.get("jinja", False)
    params.ui = False
    params.endpoint_slots = False
    params.endpoint_metrics = True  # the gateway detects a hang by these metrics
    # Adapters are loaded but not applied: each request selects one.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["loras"]]
    params.lora_init_without_apply = True
    # Nothing is kept from one request to the next: the prompt cache ignores adapters (llama.cpp issue 26207), and knows
    # no tenants.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.n_cache_reuse = 0
    params.slot_prompt_similarity = 0.0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(f"{error}")  # the server's log gives the reason
    sys.stdout.write(f"llama.cpp serves at {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
