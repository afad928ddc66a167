"""A case's process: sets the environment, runs the case, sends its measurements to the parent."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_cases.plan import Case


def work(case: Case, toy: bool, sender: Connection, log: Path) -> None:
    """Run a case; the last message is its outcome: done, skipped or failed, with the reason.

    Args:
        case: what to run.
        toy: at toy size.
        sender: where measurements go.
        log: receives the output of libraries.
    """
    os.setsid()  # what it starts can be ended with it
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **case.environment})
    with log.open("w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
        sender.send(_outcome(case, toy, sender))


def _outcome(case: Case, toy: bool, sender: Connection) -> dict[str, Any]:
    from gpu_cases.reporting import Skipped

    def report(name: str, passed: bool | None = None, **values: Any) -> None:
        sender.send({"name": name, "passed": passed, "values": values})

    try:
        module = importlib.import_module(f"gpu_cases.{case.module}")
        module.run(report, toy, **case.arguments)
    except Skipped as reason:
        return {"state": "skipped", "why": str(reason)}
    except Exception as error:  # noqa: BLE001  (a case that fails is a result, and the others still run)
        frames = traceback.format_exception(error)
        return {"state": "failed", "why": f"{type(error).__name__}: {error}", "traceback": "".join(frames[-6:])}
    return {"state": "done"}
