"""The child process that compiles grammars first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from making.tiny_bases import byte_tokenizer
from tunewright.generation.constraints import Grammar, GrammarCompiler
from tunewright.generation.grammar_process import GrammarProcess

COMPILER = GrammarCompiler(byte_tokenizer(), {0})
QUICK = COMPILER.rules(Grammar.choices(["a", "b"]))
ENDLESS = COMPILER.rules(
    Grammar.json_schema({"allOf": [{"type": "integer", "multipleOf": prime} for prime in (89, 97, 101, 103)]})
)


@pytest.fixture
def process() -> Iterator[GrammarProcess]:
    process = GrammarProcess(COMPILER.tokenizer_arguments)
    yield process
    process.end()


def child_of(process: GrammarProcess) -> int:
    assert process._child is not None
    return process._child.pid


def test_child_is_kept_killed_at_the_limit_and_started_again(process: GrammarProcess) -> None:
    assert process.fault(QUICK, 60) is None
    first = child_of(process)
    assert process.fault(COMPILER.rules(Grammar.regex("(")), 60) is None, "the server finds the error itself"
    assert child_of(process) == first
    assert process.fault(ENDLESS, 0.2) == "it takes over 0.2 s to compile"
    assert not Path(f"/proc/{first}").exists()
    assert process.fault(QUICK, 60) is None


def test_child_that_was_killed_from_outside_is_started_again(process: GrammarProcess) -> None:
    assert process.fault(QUICK, 60) is None
    os.kill(child_of(process), signal.SIGKILL)
    os.waitid(os.P_PID, child_of(process), os.WEXITED | os.WNOWAIT)
    assert process.fault(QUICK, 60) is None


def test_process_that_does_not_start_is_an_os_error() -> None:
    process = GrammarProcess({"tokenizer": "no JSON"})
    with pytest.raises(OSError, match="does not answer"):
        process.fault(QUICK, 60)


PARENT = """
import json, sys, threading
from tunewright.generation.grammar_process import GrammarProcess
assert "torch" not in sys.modules and "transformers" not in sys.modules
tokenizer, quick, endless = json.load(sys.stdin)
process = GrammarProcess(tokenizer)
assert process.fault(quick, 60) is None
print(process._child.pid, flush=True)
process.fault(endless, 600)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_child_ends_with_its_parent_also_while_it_compiles() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps([COMPILER.tokenizer_arguments, QUICK, ENDLESS]))
        parent.stdin.close()
        child = int(parent.stdout.readline())
        until_busy(child)
        parent.kill()
    end = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "Z" not in state(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def until_busy(process: int) -> None:
    """Wait until it has computed for two ticks more: it compiles."""

    def ticks() -> int:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11])

    before, end = ticks(), time.monotonic() + 60
    while ticks() < before + 2:
        assert time.monotonic() < end
        time.sleep(0.01)
