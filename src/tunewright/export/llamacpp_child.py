"""A child process for llama.cpp, because an invalid file may end the process (``GGML_ASSERT``).

Usage: python -m tunewright.export.llamacpp_child MODEL CONTEXT THREADS KEY [LORA]. It prints its address, and ends
with its parent.
"""

from __future__ import annotations

import sys
import threading

from tunewright.core.processes import end_with_parent


def main(model: str, context: str, threads: str, key: str, lora: str | None = None) -> None:
    """Serve a GGUF file on loopback."""
    end_with_parent()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = int(context)
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
