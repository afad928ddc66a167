"""Processor time of the gateway per request: authentication, quota, scheduling, tokenization and streaming.

    python benchmarks/gateway_cost.py [--requests 200] [--rounds 4] [--turns 3] [--tokens 16]

A tenant sends requests to a server whose engine computes nothing: each of sixteen rows gets a token every 18 ms, so the
process's time is the gateway's. The sides alternate, each in new processes, with the clients in another one:

    current        uvicorn with uvloop and httptools
    pure Python    with asyncio's loop and h11, the fallback if those are not installed

Prints a table, and writes benchmarks/results/gateway_cost.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from arrivals import Ask
from load_clients import Clients
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.lineage import SystemPrompt
from tunewright.chat import open_chat
from tunewright.chat.answers import grammar_compiler
from tunewright.config import ChatConfig, GatewayConfig
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.engines.peft import Subscription, TokenDispatch
from tunewright.engines.protocol import PREFILL_TOKENS, Delta, TokenSink
from tunewright.generation.requests import Request
from tunewright.models.bases import resolve_base
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Grounds

SIDES = ("current", "pure Python")
RESULTS = Path(__file__).with_name("results") / "gateway_cost.json"
PROMPT = (Message("user", "My landlord keeps the deposit and says that the carpet was stained. What is this about?"),)
ALIAS, EVERY = "alias", 0.018
"""A pass's seconds."""


def main() -> None:
    """Run the sides in turns, or one of them or its clients as a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--ask", nargs=2, metavar=("URL", "KEY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        url, key = options.ask
        ask(url, key, options)
        return
    if options.side:
        print(json.dumps(measure(options)))
        return
    sides: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.turns):
        for side, found in sides.items():
            ran = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, check=True)
            found += json.loads(ran.stdout.splitlines()[-1])
    show(sides)
    settings = {name: getattr(options, name) for name in ("requests", "rounds", "turns", "tokens")}
    write_json(RESULTS, {"machine": machine(0), "settings": settings, "ms_a_request": sides})


class IdleEngine:
    """An engine that delivers fixed tokens and computes nothing."""

    name = "peft"
    unsupported: frozenset[str] = frozenset()
    max_num_seqs, prefill_tokens, context_length = 16, PREFILL_TOKENS, 2048
    stopped: str | None = None
    permanently_stopped = False
    in_flight = (0, 0)

    def __init__(self) -> None:
        self._rows: dict[Subscription, int] = {}
        """The remaining tokens of each request."""
        self._changed = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:  # noqa: ARG002
        """Deliver a token with each pass."""
        subscription = Subscription(sink)
        with self._changed:
            self._rows[subscription] = request.max_new_tokens
        return lambda: None

    def _run(self) -> None:
        dispatch = TokenDispatch()
        while True:
            time.sleep(EVERY)
            with self._changed:
                for subscription, left in list(self._rows.items()):
                    dispatch.put(subscription, Delta((100 + left,), None if left > 1 else "length"))
                    self._rows[subscription] -= 1
                    if left == 1:
                        del self._rows[subscription]
            dispatch.send()

    async def load(self, digest: str, folder: Path) -> None:
        """Do nothing."""

    async def unload(self, digest: str) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


def measure(options: argparse.Namespace) -> list[float]:
    """Return milliseconds per request in each round but the first."""
    if options.side == "pure Python":
        for name in ("uvloop", "httptools"):
            sys.modules[name] = None  # type: ignore[assignment]  # as if it were not there
    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    chat = open_chat(base, ChatConfig(), LogReporter())
    tokenization, took = Tokenization(chat.prompt, chat.continuation, chat.text, grammar_compiler(chat)), []
    with tempfile.TemporaryDirectory() as folder:
        state, engine = State(f"sqlite:///{folder}/state.sqlite", "gateway_cost"), IdleEngine()
        state.tenants.add("tenant", [ALIAS])
        key, _ = state.keys.create("tenant")
        state.releases.deploy(ALIAS, "adapter", "0" * 64, Grounds(None, None, "a benchmark"))
        served = ServedAdapter(Path(folder), SystemPrompt(None))
        auth = TenantAuth(state, engine, lambda _name, _digest: served, LogReporter())
        with serving(Gateway(engine, auth, tokenization, GatewayConfig()).app) as url:
            for _ in range(options.rounds + 1):
                before = time.process_time()
                subprocess.run([sys.executable, *sys.argv, "--ask", url, key], check=True)
                took.append(1000 * (time.process_time() - before) / options.requests)
    return took[1:]


def ask(url: str, key: str, options: argparse.Namespace) -> None:
    """Send the requests, one every 20 ms."""
    asks = [Ask(0.02 * number, 0) for number in range(options.requests)]
    answers, _ = asyncio.run(Clients(url, [key], [ALIAS]).open_loop(asks, lambda _: PROMPT, options.tokens))
    assert all((answer.status, answer.counted) == (200, options.tokens) for answer in answers)


def show(sides: Mapping[str, Sequence[float]]) -> None:
    """Print the time of each side."""
    table = Table("processor time of a request", "median", "least", "most")
    for side, found in sides.items():
        table.add_row(side, *(f"{value:.2f} ms" for value in (statistics.median(found), min(found), max(found))))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
