"""llama.cpp's own server for `serve_rivals.py`, with its defaults, until standard input ends.

Usage: python benchmarks/bare_llamacpp.py SETTINGS, a JSON object with ``model``, ``loras``, ``port``, ``rows``,
``tokens`` (of the key/value cache) and ``threads``. It imports nothing else, so that its memory is llama.cpp's.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp


def main(text: str) -> None:
    """Serve on loopback."""
    settings: dict[str, Any] = json.loads(text)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames, params.port = ["127.0.0.1"], settings["port"]
    params.n_parallel, params.kv_unified = settings["rows"], True
    params.n_ctx, params.fit_params = settings["tokens"], False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    # As with --lora-init-without-apply: each request names its adapter.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["loras"]]
    params.lora_init_without_apply = True
    server = xllamacpp.Server(params)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main(sys.argv[1])
