"""The config's gateway section: how large a request may be, and how long each part of it may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.config.section import Section


class GatewayConfig(Section):
    """What `tunewright serve` takes from clients: the largest request, and how long it waits for what."""

    body_bytes: Annotated[
        int | None,
        Field(
            ge=1024,
            description="The largest request (null: 16 bytes for each token of the context and 64 KiB; text has 4 "
            "bytes a token, and JSON spells some characters out).",
        ),
    ] = None
    messages: Annotated[
        int,
        Field(
            ge=1,
            description="The most messages of a conversation (128: rendered in 0.2 s; the time grows with the square).",
        ),
    ] = 128
    prompt_tokens: Annotated[
        int | None, Field(ge=1, description="The longest prompt (null: what the context has room for).")
    ] = None
    answer_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="The longest answer: a client that asks for more by max_tokens, or for nothing, gets this many "
            "(null: what the context has room for).",
        ),
    ] = None
    body_s: Annotated[float, Field(gt=0, description="Seconds in which a request has to be read whole.")] = 30
    queue_s: Annotated[float, Field(gt=0, description="Seconds that a request may wait for its turn.")] = 60
    first_token_s: Annotated[
        float, Field(gt=0, description="Seconds from its turn to the first token (120: a long prompt without a GPU).")
    ] = 120
    between_tokens_s: Annotated[float, Field(gt=0, description="Seconds from one token to the next.")] = 60
    total_s: Annotated[
        float,
        Field(gt=0, description="Seconds for a request in all (600: OpenAI's own client gives up after as long)."),
    ] = 600
    drain_s: Annotated[
        float, Field(ge=0, description="Seconds that answers under way have to end when the server is told to stop.")
    ] = 30
