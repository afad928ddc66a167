"""Checks on a CUDA card: kernels against float64, training against trl, memory against the estimate, decoding.

    python benchmarks/gpu_proof.py [--minutes 60] [--out FOLDER] [--done FILE] [--only CASE ...]
    python benchmarks/gpu_proof.py --toy           every case at toy size, on the processor too
    python benchmarks/gpu_proof.py --page          writes the table of docs/gpu.md from the results, and runs nothing

Each case is a separate process with a time limit. A line is printed and the results file is written after every
measurement, so nothing is lost if a case or the run is cut. ``--done`` takes such a file. It keeps the cases that met
their bars, runs those that the file does not have, and then repeats those that failed or missed a bar. Nothing is
fetched: bases have random weights, and the tokenizer is made here.

The results file is FOLDER/CARD-DATE.json; in the default FOLDER, benchmarks/results/gpu, docs/gpu.md is written from it
too. Exit codes: 0 every case ran and met its bar, 1 one did not, 2 wrong usage or no card, 4 cut by ``--minutes``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_cases.page import rows_of, table_text, write_page
from gpu_cases.plan import Case, cases
from gpu_cases.worker import work
from packaging.requirements import Requirement

RESULTS = Path(__file__).with_name("results") / "gpu"
TOY = "toy"
LOG_CHARACTERS = 4000
"""As much is kept of what a failed case's libraries printed last."""
PRELOADED = [
    "tunewright.training.trainer",
    "tunewright.training.run",
    "tunewright.generation.generate",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
]
"""Imported once where there is no card, and processes are forked. With one each process starts by itself: peft imports
bitsandbytes, whose import asks the driver for the card's capability, and forks cannot share a driver."""


def main() -> int:
    """Run the cases and return the exit code."""
    options = _options()
    if options.page:
        write_page(RESULTS)
        return 0
    earlier = None if options.done is None else _earlier(options.done)
    card, why = _card()
    if card is None and not options.toy:
        print(
            f"Error: no CUDA card can be used here: {why}.\n"
            "--toy runs every case at toy size on the processor; it shows that they run, not what a card does.",
            file=sys.stderr,
        )
        return 2
    if (message := untested_torch(metadata.version("torch"))) is not None:
        print(f"Warning: {message}", file=sys.stderr)
    chosen = [case for case in cases() if not options.only or case.name in options.only]
    document = _document(earlier, card=TOY if options.toy else str(card))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{document['card'].replace(' ', '-')}-{document['date']}.json"
    deadline = time.monotonic() + 60 * options.minutes
    left = Run(document, file, deadline, toy=options.toy, forked=card is None).run(chosen)
    print(table_text(rows_of(document)))
    print(f"Results: {file}")
    if options.out == RESULTS and not options.toy:
        write_page(RESULTS)
    if left:
        print(f"Cut by --minutes {options.minutes:g} with {len(left)} of {len(chosen)} cases left: {', '.join(left)}")
        print(f"Continue with --done {file}")
    states = [document["cases"][case.name] for case in chosen if case.name in document["cases"]]
    if any(state["state"] == "failed" or _missed(state) for state in states):
        return 1
    return 4 if left else 0


def _missed(state: dict[str, Any]) -> bool:
    return any(each["passed"] is False for each in state["measurements"])


def _options() -> argparse.Namespace:
    names = [case.name for case in cases()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the processor where there is no card")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long (60)")
    parser.add_argument("--out", type=Path, help="folder of the results file")
    parser.add_argument("--done", type=Path, help="results file of a run that was cut")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CASE", help=f"some of: {', '.join(names)}".replace("%", "%%")
    )
    parser.add_argument("--page", action="store_true", help="write the table of docs/gpu.md, run nothing")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be greater than 0 (got {options.minutes:g})")
    if options.out is None:
        # Toy results are no evidence and are not kept with the others.
        options.out = RESULTS.parents[2] / "build" / "gpu_proof" if options.toy else RESULTS
    if options.done is not None and not options.done.is_file():
        parser.error(f"--done: there is no file {options.done}")
    return options


def _card() -> tuple[str | None, str]:
    """Return the name of the first card, or None and the reason; another process asks, and so holds the driver."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_card_or_reason)


def _card_or_reason() -> tuple[str | None, str]:
    import torch
    from gpu_cases.ceilings import driver_state

    from tunewright.models.memory_plan import unusable_card

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), ""
    driver = ", ".join(f"{name} {value}" for name, value in driver_state().items())
    return None, f"{unusable_card() or f'torch {torch.__version__} has no CUDA, or it is hidden'} ({driver})"


def untested_torch(version: str) -> str | None:
    """Return a warning if this version of torch is not one that pyproject.toml allows."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = next(r for r in map(Requirement, project["optional-dependencies"]["train"]) if r.name == "torch").specifier
    return (
        None if tested.contains(version, prereleases=True) else f"not tested with torch {version}, only with {tested}"
    )


def _earlier(file: Path) -> dict[str, Any]:
    """Return the results of an earlier run, without the case that was cut.

    Raises:
        SystemExit: the file is not one of these.
    """
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        cases_before = {name: state for name, state in document["cases"].items() if state["state"] != "cut"}
        return {"card": str(document["card"]), "date": str(document["date"]), "cases": cases_before}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _refusal(f"{file} is not a results file of gpu_proof") from None


def _document(earlier: dict[str, Any] | None, card: str) -> dict[str, Any]:
    """Return the results to add to: those of an earlier run, or none.

    Raises:
        SystemExit: the earlier run was on another card.
    """
    if earlier is None:
        return {"card": card, "date": datetime.date.today().isoformat(), "cases": {}}
    if earlier["card"] != card:
        raise _refusal(f"it has results of {earlier['card']}, and this run is on {card}")
    return earlier


def _refusal(what: str) -> SystemExit:
    """Print the problem of ``--done``; return the exception that ends the program."""
    print(f"Error: --done: {what}", file=sys.stderr)
    return SystemExit(2)


class Run:
    """The cases one after the other, each in its process; the document is written after every measurement."""

    def __init__(self, document: dict[str, Any], file: Path, deadline: float, *, toy: bool, forked: bool) -> None:
        self.document = document
        self.file = file
        self.deadline = deadline
        self.toy = toy
        self.context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            self.context.set_forkserver_preload(PRELOADED)

    def run(self, chosen: list[Case]) -> list[str]:
        """Run the remaining cases; return the names of those that did not fit into the time."""
        before = self.document["cases"]
        settled = {name for name, state in before.items() if state["state"] != "failed" and not _missed(state)}
        left = []
        # What was never measured comes before what failed and was perhaps repaired.
        for case in sorted(chosen, key=lambda case: case.name in before):
            if case.name in settled:
                print(f"{case.name}: done before", flush=True)
            elif not self._fits(case) or self._run(case) == "cut":
                left.append(case.name)
        return left

    def _fits(self, case: Case) -> bool:
        """Return whether the case can end in time; a shorter one may still fit."""
        return time.monotonic() + (0 if self.toy else case.expected) < self.deadline

    def _run(self, case: Case) -> str:
        """Run one case in a separate process; return its outcome."""
        state: dict[str, Any] = {"state": "cut", "date": datetime.date.today().isoformat(), "measurements": []}
        self.document["cases"][case.name] = state
        receiver, sender = self.context.Pipe(duplex=False)
        began = time.monotonic()
        limit = began + case.seconds
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            process = self.context.Process(target=work, args=(case, self.toy, sender, log))
            process.start()
            sender.close()
            try:
                self._listen(case, state, receiver, min(limit, self.deadline))
            finally:
                # Without its last message it hangs or is dying already.
                _end(process, grace_s=1 if state["state"] == "cut" else 10)
            state["seconds"] = round(time.monotonic() - began, 1)
            if state["state"] == "cut" and time.monotonic() < self.deadline:
                timed_out = time.monotonic() >= limit
                why = f"not done within {case.seconds} s" if timed_out else f"its process ended with {process.exitcode}"
                state |= {"state": "failed", "why": why}
            if state["state"] == "failed":
                state["log"] = log.read_text(errors="replace")[-LOG_CHARACTERS:] if log.exists() else ""
        self._write()
        reason = f": {state['why']}" if "why" in state else ""
        print(f"{case.name}: {state['state']} after {state['seconds']:.1f} s{reason}", flush=True)
        return str(state["state"])

    def _listen(self, case: Case, state: dict[str, Any], receiver: Connection, until: float) -> None:
        """Take measurements until the case has ended or time is over."""
        while receiver.poll(max(0.0, until - time.monotonic())):
            try:
                message = receiver.recv()
            except EOFError:
                return
            if "state" in message:
                state |= message
                return
            state["measurements"].append(message)
            self._write()
            print(f"{case.name}: {measurement_text(message)}", flush=True)

    def _write(self) -> None:
        """Write the results atomically."""
        from tunewright.core.io import write_json

        write_json(self.file, self.document)


def _end(process: Any, grace_s: float) -> None:
    """End a case's process and its children, after waiting a moment for a normal exit."""
    process.join(grace_s)
    if process.exitcode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It has not made a group of its own yet.
            process.kill()
        process.join()


def measurement_text(measured: dict[str, Any]) -> str:
    """Return a measurement in one line."""
    shown = {name: value for name, value in measured["values"].items() if not isinstance(value, list)}
    values = ", ".join(f"{name} {_value(name, value)}" for name, value in shown.items())
    verdict = {True: "  ok", False: "  MISSED", None: ""}[measured["passed"]]
    return f"{measured['name']}: {values}{verdict}"


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value / 1e9:.3f} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
