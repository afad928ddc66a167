"""The config's gateway section: limits on the size and duration of requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.config.section import Section


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
