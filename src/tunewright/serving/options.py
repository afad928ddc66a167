"""Options of a server, of an engine, of a release and of a tenant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from tunewright.core.errors import UserError
from tunewright.core.options import EngineName, Option


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a server; options without a value come from the config."""

    host: Annotated[str | None, Option("Address to listen on.", default="serve.host in the config")] = None
    port: Annotated[
        int | None,
        Option("Port to listen on; 0 for any.", default="serve.port in the config", min=0, max=65535),
    ] = None
    metrics_port: Annotated[
        int | None,
        Option("Port of Prometheus metrics; 0 for any.", default="serve.metrics_port in the config", min=0, max=65535),
    ] = None
    metrics_host: Annotated[
        str | None, Option("Address of the metrics port.", default="serve.metrics_host in the config")
    ] = None
    auth: Annotated[
        bool,
        Option("Without tenants: accept everyone, even on an address reachable by others.", name="--no-auth"),
    ] = True
    system_prompts: Annotated[
        bool,
        Option(
            "Without tenants: do not add the trained system prompt to requests without a system message.",
            name="--no-system-prompt",
        ),
    ] = True
    constrain: Annotated[
        bool, Option("Without tenants: constrain the adapters' answers by evaluate.structured_outputs.")
    ] = False
    engine: Annotated[EngineName | None, Option("Inference engine.", default="serve.engine in the config")] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of an engine for servers on other machines."""

    host: Annotated[str, Option("Address to listen on; one that other machines can reach needs a token.")] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 for any.", min=0, max=65535)] = 8100
    engine: Annotated[EngineName | None, Option("Inference engine.", default="serve.engine in the config")] = None


def percent(text: str, where: str) -> float:
    """Return the share that a text like 10% or 0.5% states."""
    match = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,4})?)%", text)
    if match is None or not float(match[1]):
        raise UserError(
            f"Invalid percentage {text!r}", where=where, fix="Use a percentage such as 10% or 0.5%, below 100%."
        )
    return float(match[1]) / 100


def percent_or_all(text: str, where: str) -> float:
    """Return the share that a text like 10% or 100% states."""
    return 1.0 if text == "100%" else percent(text, where)


@dataclass(frozen=True, kw_only=True)
class ReleaseTestOptions:
    """Options of the tests that a release passes before it goes live."""

    engine: Annotated[
        EngineName | None,
        Option("Engine of the isolation test and the serving check.", default="serve.engine in the config"),
    ] = None
    untested: Annotated[
        str | None,
        Option(
            "Skip the isolation test and the serving check for this reason, which is stored.",
            metavar="REASON",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeployOptions(ReleaseTestOptions):
    """Options of a release."""

    canary: Annotated[
        float | None, Option("Share of the traffic to try it on, such as 10%.", default="all", parse=percent)
    ] = None
    """Above 0 and below 1; the live release answers the rest."""
    shadow: Annotated[
        bool, Option("Experimental: send it a copy of each request and record its answers; none is returned.")
    ] = False
    because: Annotated[str | None, Option("Reason, stored in the release history.")] = None
    """Releases regardless of the verdict and the serving check."""
    system_prompt: Annotated[
        bool,
        Option("Do not add the trained system prompt to requests without a system message.", name="--no-system-prompt"),
    ] = True
    constrain: Annotated[bool, Option("Constrain answers by evaluate.structured_outputs: texts or calls.")] = False


@dataclass(frozen=True, kw_only=True)
class ShadowPlanOptions:
    """Assumptions of a shadow's plan; an option without a value is measured on the alias."""

    differs: Annotated[
        float | None,
        Option(
            "Share of the answers that differ, such as 12%.", default="measured on the newest shadow", parse=percent
        ),
    ] = None
    """Above 0 and below 1; each request is then a unit of its own."""
    per_day: Annotated[int | None, Option("Requests a day.", default="measured on the last 28 days", min=1)] = None


@dataclass(frozen=True, kw_only=True)
class ShadowReviewOptions:
    """Terms of a shadow's review, declared at the first look."""

    max_units: Annotated[
        int, Option("Units after which the sequence ends with can't tell (first call only).", min=100, max=100_000)
    ] = 2000


@dataclass(frozen=True, kw_only=True)
class ShadowJudgeOptions:
    """Options of a judge in a shadow's review."""

    contracts: Annotated[
        tuple[str, ...],
        Option(
            "Reference of a contract that permits sending the requests recorded under it to the judge (repeatable).",
            name="--contract",
        ),
    ] = ()
    people: Annotated[
        float | None,
        Option(
            "Share of the differing pairs that people judge, such as 20%; it cannot change.",
            default="20%",
            parse=percent,
        ),
    ] = None
    """Above 0 and below 1; None: the share of the first call, which is 20% by default."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Terms on which a tenant's requests are recorded."""

    contract: Annotated[str | None, Option("Reference of the contract that permits it, stored in the audit log.")] = (
        None
    )
    days: Annotated[
        int, Option("Days until a new record is deleted; earlier records keep theirs.", min=1, max=3650)
    ] = 30
    share: Annotated[
        float | None,
        Option(
            "Share of the units to record, each with all of its requests, such as 10%.",
            default="all",
            parse=percent_or_all,
        ),
    ] = None
    """Above 0 and at most 1; None: all."""


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """New limits of a tenant, each a number or ``none``; an omitted limit stays."""

    requests: Annotated[str | None, Option("Requests per minute, or none for no limit.")] = None
    tokens: Annotated[str | None, Option("Prompt and answer tokens per minute, or none for no limit.")] = None
    concurrency: Annotated[str | None, Option("Concurrent requests, or none for no limit.")] = None
