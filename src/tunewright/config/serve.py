"""The config's serve and gateway sections: the server, and its limits on requests."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tunewright.config.section import EngineName, Quantization, Section


class ServeConfig(Section):
    """Settings of the server."""

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on (0: any free one).")] = 8000
    engine: Annotated[
        EngineName,
        Field(
            description="Engine that computes the answers. peft is built in; vllm needs the environment that "
            "`tunewright engine install vllm` creates; llamacpp needs tunewright[llamacpp]."
        ),
    ] = "peft"
    metrics_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="Separate port for Prometheus metrics (0: any free one; null: off). It exposes the names of "
            "all tenants.",
        ),
    ] = None
    metrics_host: Annotated[str, Field(description="Address that the metrics port listens on.")] = "127.0.0.1"
    gguf: Annotated[
        Literal["f16", "q8_0"],
        Field(
            description="Type of the base's weights in the engine llamacpp: f16 keeps 16-bit weights; q8_0 takes half "
            "the memory and changes answers slightly (docs/benchmarks/serving.md has figures)."
        ),
    ] = "f16"
    max_num_seqs: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of conversations generated at once, over all adapters (null: 16; with the "
            "engine vllm on a "
            "GPU 128, or 256 from 70 GB of memory).",
        ),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        Field(
            description="Addresses of engines on other machines, such as http://gpu-1:8100, each started there with "
            "`tunewright engine serve` on the same base. A name with several addresses, such as that of a headless "
            "service, stands for all of them. Empty: `tunewright serve` starts one engine itself."
        ),
    ] = ()
    spare_adapters: Annotated[
        int,
        Field(
            ge=0,
            description="Slots in the engine vllm for adapters beyond those that are live at the start; used with "
            "tenants. A rollout takes one slot until the previous adapter is unloaded.",
        ),
    ] = 4
    quantization: Annotated[
        Quantization | None, Field(description="Quantization of the base (null: as in the adapters' training).")
    ] = None
    database_url: Annotated[
        str | None,
        Field(
            description="Database of tenants, keys, releases and usage: postgresql://USER@HOST/DATABASE, which several "
            "servers can share, or sqlite:///FILE (null: serving/state.sqlite in the project). Put a password into "
            "PGPASSWORD or ~/.pgpass."
        ),
    ] = None
    adapter_store: Annotated[
        str | None,
        Field(
            description="Folder or URL, such as s3://bucket/adapters, that `tunewright adapters push` copies to. With "
            "tenants, a server imports a released adapter from there that is missing here. Credentials are read from "
            "the environment."
        ),
    ] = None

    @field_validator("engines")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            _ = parts.port, (parts.hostname or "").encode("idna")  # each raises a ValueError that says what is wrong
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise ValueError(f"{url!r} is not the address of an engine: use http://HOST:PORT")
        return tuple(url.rstrip("/") for url in urls)


class GatewayConfig(Section):
    """Limits that `tunewright serve` puts on the size and duration of requests."""

    max_body_bytes: Annotated[
        int | None,
        Field(
            ge=1024,
            description="Largest request body in bytes (null: 64 KiB plus 16 bytes for each token of the context; text "
            "has about 4 bytes a token, and JSON escapes some characters).",
        ),
    ] = None
    max_messages: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of messages in a conversation (128: rendered in 0.2 s; the time grows with "
            "the square).",
        ),
    ] = 128
    max_n: Annotated[
        int,
        Field(
            ge=1,
            le=128,
            description="Largest n: answers to one prompt, each of which takes a row of the batch and counts in limits "
            "(16: as many as a batch has rows by default; OpenAI takes 128).",
        ),
    ] = 16
    max_prompt_tokens: Annotated[
        int | None, Field(ge=1, description="Longest prompt in tokens (null: what fits the context).")
    ] = None
    max_completion_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="Longest answer in tokens. A larger max_tokens is capped to it, and it is the default of a "
            "request without max_tokens (null: what fits the context).",
        ),
    ] = None
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of open connections. At the maximum, a new one takes the place of the one that "
            "has waited longest for a request (4096: over 100 MiB if each sends the largest headers).",
        ),
    ] = 4096
    header_timeout_s: Annotated[
        float, Field(gt=0, description="Seconds in which the request line and all headers must arrive.")
    ] = 10
    keep_alive_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds that a connection may wait for its next request (75: longer than a proxy keeps an "
            "idle connection, so that it never sends a request into a closed one).",
        ),
    ] = 75
    body_timeout_s: Annotated[float, Field(gt=0, description="Seconds in which the whole body must arrive.")] = 30
    queue_timeout_s: Annotated[float, Field(gt=0, description="Seconds that a request may wait in the queue.")] = 60
    first_token_timeout_s: Annotated[
        float, Field(gt=0, description="Seconds from admission to the first token (120: a long prompt without a GPU).")
    ] = 120
    inter_token_timeout_s: Annotated[float, Field(gt=0, description="Seconds between two tokens.")] = 60
    total_timeout_s: Annotated[
        float,
        Field(gt=0, description="Seconds for the whole request (600: the default timeout of OpenAI's client)."),
    ] = 600
    drain_timeout_s: Annotated[
        float, Field(ge=0, description="Seconds that running answers have to finish when the server shuts down.")
    ] = 30
