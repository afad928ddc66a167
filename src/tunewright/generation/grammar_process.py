"""A child process that compiles grammars first: llguidance cannot be interrupted, but a process can be killed.

The child (``python -m tunewright.generation.grammar_process``) reads lines of JSON: the arguments
of llguidance's tokenizer, then the rules of each grammar. It answers each with an empty line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from threading import Thread
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tunewright.core.processes import PIPE, Process, end, start

START_SECONDS = 60.0

_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, step_lexer_fuel=100_000, step_max_items=20_000, verbose_errors=False
)
"""Half of llguidance's own limits: most rules compile within a second, and their next mask takes a tenth of it. They
count work, not time, so the same rule fails at the same token on every machine."""


def compiled(tokenizer: LLTokenizer, rules: str) -> LLMatcher:
    """Return the matcher of a grammar; it may have an error."""
    matcher = LLMatcher(tokenizer, rules, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first mask takes longest, and every row begins with it
    return matcher


class GrammarProcess:
    """The child, which is started for the first grammar, and again after it was killed."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._child: Process | None = None

    def fault(self, rules: str, seconds: float) -> str | None:
        """Return why a grammar must not be compiled here; None once the child has compiled it, or found its error."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        fault = self._ask(rules, seconds)
        if fault is not None:
            self.end()
        return fault

    def end(self) -> None:
        """Kill the child, if it runs."""
        if self._child is not None:
            end(self._child)
            self._child = None

    def _start(self) -> None:
        self.end()
        # -P: nothing is imported from the working directory.
        self._child = start([sys.executable, "-P", "-m", __name__], stdout=PIPE)
        if self._ask(self._tokenizer, START_SECONDS) is not None:
            self.end()
            raise ChildProcessError(f"the process does not answer within {START_SECONDS:g} s, or ends")

    def _ask(self, value: Any, seconds: float) -> str | None:
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._child.stdin.write(json.dumps(value).encode() + b"\n")
            self._child.stdin.flush()
        with DefaultSelector() as selector:
            selector.register(self._child.stdout, EVENT_READ)
            if not selector.select(seconds):
                return f"it takes over {seconds:g} s to compile"
        return None if self._child.stdout.read(1) else "the grammar compiler crashes"


def _read(lines: SimpleQueue[bytes]) -> None:
    with open(0, "rb") as source:  # not sys.stdin, for whose lock Python would wait at exit
        for line in source:
            lines.put(line)
    os._exit(0)  # ends with the server, even while a grammar is compiled


def _main() -> None:
    lines: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_read, args=(lines,), daemon=True).start()
    tokenizer = LLTokenizer(**json.loads(lines.get()))
    while True:
        os.write(1, b"\n")
        compiled(tokenizer, json.loads(lines.get()))


if __name__ == "__main__":
    _main()
