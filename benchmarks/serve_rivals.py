"""tunewright's server on three engines against vLLM, llama.cpp and transformers, on one machine in one run.

    python benchmarks/serve_rivals.py PROJECT [--only NAME ...] [--quick] [--rounds 2] [--adapters 1 8 32]

PROJECT has a trained adapter; every tenant gets a version of its own. All servers have the same base, adapters, rows
and threads, and get the same streamed requests, which do not wait for answers (Poisson arrivals, Zipf over tenants).
One in four prompts is long. Answers are greedy and end at their token limit only. Each server is started, measured
and stopped in its turn, and every second round goes backwards, so that other work on the machine meets all of them:

    full    many requests nearly at once: the throughput
    load    fewer than the fastest can answer: waits, and goodput, the requests a second that are answered in time
    cold    seconds from the release of a further adapter to its first token

A server that cannot run is named with the reason. Prints a table, writes benchmarks/results/serve_rivals.json, the
table of docs/benchmarks/rivals.md and docs/images/serve-rivals.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
from arrivals import Answer, Ask, Bounds, Waits, burst, poisson, zipf_shares
from load_shown import machine
from load_tenants import make_adapters
from matplotlib.figure import Figure
from rivals import RIVALS, Material, Rival, Server, UnavailableError

from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json, write_text
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.data.versions import load_version
from tunewright.open_project import OpenProject

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve_rivals.json"
PLOT = ROOT / "docs" / "images" / "serve-rivals.svg"
PAGE = ROOT / "docs" / "benchmarks" / "rivals.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SEED = 0
IN_TIME = Bounds(first=2.0, between=0.25)
"""A reader's patience on two cores: the first token within two seconds, then at least four tokens a second."""
LONG_EVERY = 4
"""One prompt in this many is long."""
BEGINNING = 8
"""Characters of an answer that are compared: roundings differ between engines, so long answers drift apart."""
QUICK = {"adapters": [1, 4], "rounds": 1, "jobs": 8, "seconds": 4.0, "rate": 2.0, "tokens": 8, "long_characters": 300}

Prompt = tuple[Message, ...]


@dataclass
class Measured:
    """The results of one server with one number of adapters, over the rounds."""

    full: list[dict[str, float]] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)
    """Of the phase ``load``, by round."""
    long: list[list[bool]] = field(default_factory=list)
    """True for each of these whose prompt was long."""
    memory: list[int] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)


Found = dict[str, dict[int, Measured]]
"""By server and number of adapters."""


def main() -> None:
    """Measure all servers in alternating rounds."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no server is left behind
    about = {
        "machine": machine(options.threads),
        "settings": {name: value for name, value in vars(options).items() if name not in ("project", "save", "quick")},
        "versions": {name: version(name) for name in ("xllamacpp", "transformers", "torch")} | vllm_version(),
        "in_time": {"first_s": IN_TIME.first, "between_mean_s": IN_TIME.between},
    }
    found: Found = {}
    missing: dict[str, str] = {}
    loads: list[float] = []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "project"
        shutil.copytree(options.project, root)
        opened = OpenProject(ProjectFolder(root), LogReporter())
        adapters = make_adapters(opened, max(options.adapters) + 1, SEED, options.noise)
        meter = Meter(Material(opened, adapters, Path(temporary), options.threads, options.rows), options)
        for turn in range(options.rounds):
            for name in options.only if turn % 2 == 0 else reversed(options.only):
                if name in missing:
                    continue
                loads.append(round(os.getloadavg()[0], 1))
                try:
                    meter.measure(RIVALS[name], found.setdefault(name, {}), turn)
                except UnavailableError as error:
                    missing[name] = str(error)
                    del found[name]
                results = {**about, "others_load": loads, "missing": missing, **results_of(found)}
                if options.save:
                    write_json(RESULTS, results)  # each time: a run that is stopped keeps what it has measured
    print(table(results))
    if options.save:
        fill_page(PAGE, table(results))
        draw(results, PLOT)


def results_of(found: Found) -> dict[str, Any]:
    """Return what has been measured so far."""
    return {
        "servers": {name: {str(count): summary(one) for count, one in own.items()} for name, own in found.items()},
        "same_beginning": same_beginnings(found),
        "ratios": ratios(found),
    }


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RIVALS), choices=list(RIVALS), help="servers to measure")
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32], help="numbers of adapters, ascending")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=64, help="requests at full load")
    parser.add_argument("--rush", type=float, default=32.0, help="their arrivals per second")
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals per second of the load")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the load")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--long-characters", type=int, default=1500, help="of a long prompt, at least")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the tenants' shares")
    parser.add_argument("--noise", type=float, default=14.0, help="how far tenants' adapters are from the trained one")
    parser.add_argument("--rows", type=int, default=16, help="of the batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, nothing saved")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK, save=False)
    return parser.parse_args()


def vllm_version() -> dict[str, str]:
    """Return vLLM's version, if it is installed."""
    from tunewright.core.errors import UserError
    from tunewright.engines import environment

    try:
        return {"vllm": environment.find(environment.VLLM).versions["vllm"]}
    except UserError:
        return {}


class Meter:
    """The clients: the same requests for each server.

    Args:
        material: its project's test rows are the prompts.
    """

    def __init__(self, material: Material, options: argparse.Namespace) -> None:
        self._material = material
        self._options = options
        dataset = load_version(material.opened.folder.dataset)
        self._prompts = [tuple(row.example.prompt) for row in dataset.examples("test")]
        self._context = [row.example.prompt[-1].content for row in dataset.examples("train")]

    def measure(self, rival: Rival, found: dict[int, Measured], turn: int) -> None:
        """Start the server, measure it with each number of adapters, and stop it."""
        counts = [count for count in self._options.adapters if rival.most is None or count <= rival.most]
        for starts in [[count] for count in counts] if rival.fixed else [counts]:
            began = time.perf_counter()
            with rival.start(self._material, starts[0]) as server:
                for number, count in enumerate(starts):
                    own = found.setdefault(count, Measured())
                    if number:
                        assert server.load is not None
                        server.load(range(starts[number - 1], count))
                    self._warm_up(server, range(starts[number - 1] if number else 0, count))
                    if not number:
                        own.start.append(time.perf_counter() - began)
                    self._measure(server, count, own, turn)
                    self._say(rival, count, own)
                if len(server.clients.aliases) > count:
                    own.cold.append(self._cold(server, count))

    def _measure(self, server: Server, count: int, own: Measured, turn: int) -> None:
        options, shares = self._options, zipf_shares(count, self._options.zipf)
        seed = SEED + 1000 * turn + 10 * count
        asks = burst(options.jobs, shares, seed, options.rush)
        cpu = server.cpu()
        answers, seconds = self._ask(server, asks, seed)
        tokens = sum(answer.counted for answer in answers)
        cpu = server.cpu() - cpu
        own.full.append({"tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / cpu, "seconds": seconds})
        asks = poisson(options.rate, options.seconds, shares, seed + 1)
        answers, _ = self._ask(server, asks, seed + 1)
        own.answers.append(answers)
        own.long.append([is_long(number) for number in range(len(asks))])
        own.memory.append(server.memory())

    def _warm_up(self, server: Server, tenants: Sequence[int]) -> None:
        """Ask for each new adapter once, so that what is loaded at the first request is."""
        self._ask(server, [Ask(0.0, tenant) for tenant in tenants], -1, tokens=2)

    def _cold(self, server: Server, tenant: int) -> float:
        """Return the seconds from the release of a tenant's adapter to its first token."""
        began = time.perf_counter()
        if server.load is not None:
            server.load([tenant])
        loaded = time.perf_counter() - began
        (answer,), _ = self._ask(server, [Ask(0.0, tenant)], -2)
        return loaded + answer.first

    def _ask(
        self, server: Server, asks: Sequence[Ask], seed: int, *, tokens: int | None = None
    ) -> tuple[list[Answer], float]:
        draw, tokens = random.Random(seed), tokens or self._options.tokens
        prompts = [self._prompt(draw, long=seed >= 0 and is_long(number)) for number in range(len(asks))]
        answers, seconds = asyncio.run(server.clients.open_loop(asks, prompts.__getitem__, tokens))
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200}, statuses
        assert {answer.counted for answer in answers} == {tokens}
        return answers, seconds

    def _prompt(self, draw: random.Random, *, long: bool) -> Prompt:
        """Return a drawn prompt; a long one begins with other rows, as retrieved text would."""
        *before, last = draw.choice(self._prompts)
        text = last.content
        while long and len(text) < self._options.long_characters:
            text = f"{draw.choice(self._context)}\n{text}"
        return (*before, Message(last.role, text))

    def _say(self, rival: Rival, count: int, own: Measured) -> None:
        line = {**own.full[-1], "memory_mb": own.memory[-1] / 1e6, **Waits.of(own.answers[-1], IN_TIME).summary()}
        rounded = {name: round(value, 3) for name, value in line.items() if value is not None}
        print(f"{time.strftime('%H:%M:%S')} {rival.name}, {count}: {json.dumps(rounded)}", file=sys.stderr, flush=True)


def is_long(number: int) -> bool:
    """Return True if the n-th request has a long prompt."""
    return number % LONG_EVERY == LONG_EVERY - 1


def summary(one: Measured) -> dict[str, Any]:
    """Return the figures of one server with one number of adapters; waits are over all rounds."""
    waits = Waits.of([answer for answers in one.answers for answer in answers], IN_TIME)
    by_length = {
        name: Waits.of(
            answer
            for answers, longs in zip(one.answers, one.long, strict=True)
            for answer, long in zip(answers, longs, strict=True)
            if long == wanted
        ).summary()
        for name, wanted in (("short", False), ("long", True))
    }
    goods = [Waits.of(answers, IN_TIME).good / max(answer.end for answer in answers) for answers in one.answers]
    return {
        "tokens_per_s": statistics.median(full["tokens_per_s"] for full in one.full),
        "tokens_per_s_by_round": [full["tokens_per_s"] for full in one.full],
        "tokens_per_cpu_s": statistics.median(full["tokens_per_cpu_s"] for full in one.full),
        "requests": waits.asked,
        "good_share": waits.good / waits.asked,
        "goodput_per_s": statistics.median(goods),
        "goodput_per_s_by_round": goods,
        **waits.summary(),
        "first_by_prompt": by_length,
        "memory_bytes": max(one.memory),
        "start_s": one.start,
        "cold_s": one.cold,
    }


def ratios(found: Found) -> dict[str, dict[str, Any]]:
    """Return the ratios of throughput that have bars, within each round."""
    wanted = {
        "embedded / vllm, most adapters": ("embedded", "vllm", -1),
        "embedded / llamacpp, one adapter": ("embedded", "llamacpp", 0),
        "gateway-vllm / vllm, most adapters": ("gateway-vllm", "vllm", -1),
        "gateway-llamacpp / llamacpp, one adapter": ("gateway-llamacpp", "llamacpp", 0),
    }
    sides = {
        title: (list(found[one].values())[place], list(found[other].values())[place])
        for title, (one, other, place) in wanted.items()
        if one in found and other in found
    }
    if "embedded" in found:
        every = list(found["embedded"].values())
        sides["embedded, most adapters / one"] = every[-1], every[0]
    return {title: _ratio(*pair) for title, pair in sides.items()}


def _ratio(one: Measured, other: Measured) -> dict[str, Any]:
    pairs = list(zip(one.full, other.full, strict=False))  # the last round may be in progress
    by_round = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
    by_cpu = [a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"] for a, b in pairs]
    return {
        "ratio": statistics.median(by_round),
        "by_round": by_round,
        "ratio_by_cpu": statistics.median(by_cpu),
    }


def same_beginnings(found: Found) -> dict[str, dict[str, float]]:
    """Return the share of each server's answers that begin as the first server's: the same adapter gave them."""
    first = next(iter(found.values()), {})
    return {
        name: {
            str(count): statistics.mean(
                a.text[:BEGINNING] == b.text[:BEGINNING]
                for ours, theirs in zip(first[count].answers, own.answers, strict=False)
                for a, b in zip(ours, theirs, strict=True)
            )
            for count, own in counts.items()
        }
        for name, counts in found.items()
    }


def table(results: Mapping[str, Any]) -> str:
    """Return the results in Markdown."""
    columns = "server | adapters | tokens/s (rounds) | by processor time | in time | goodput, requests/s"
    columns += " | first token, p50 / p99 | between tokens, p50 / p99 | memory | cold load"
    names = columns.split(" | ")
    lines = [f"| {columns} |", f"| --- |{' ---: |' * (len(names) - 1)}"]
    for name, counts in results["servers"].items():
        for count, one in counts.items():
            spread = " to ".join(f"{pick(one['tokens_per_s_by_round']):.1f}" for pick in (min, max))
            cells = [
                RIVALS[name].name,
                count,
                f"{one['tokens_per_s']:.1f} ({spread})",
                f"{one['tokens_per_cpu_s']:.1f}",
                f"{one['good_share']:.0%}",
                f"{one['goodput_per_s']:.2f}",
                f"{one['first_p50']:.2f} / {one['first_p99']:.2f} s",
                f"{1000 * one['between_p50']:.0f} / {1000 * one['between_p99']:.0f} ms",
                f"{one['memory_bytes'] / 1e6:,.0f} MB",
                f"{statistics.median(one['cold_s']):.2f} s" if one["cold_s"] else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *(f"- {RIVALS[name].name}: {RIVALS[name].limits}" for name in results["servers"] if RIVALS[name].limits),
    ]
    lines += [f"- {RIVALS[name].name} was not measured: {reason}" for name, reason in results["missing"].items()]
    if results["ratios"]:
        lines += ["", "| throughput | ratio | rounds | by processor time |", "| --- | ---: | --- | ---: |"]
    for title, one in results["ratios"].items():
        spread = ", ".join(f"{value:.2f}" for value in one["by_round"])
        lines.append(f"| {title} | {one['ratio']:.2f} | {spread} | {one['ratio_by_cpu']:.2f} |")
    return "\n".join(lines)


def fill_page(page: Path, text: str) -> None:
    """Replace the results in a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot throughput and the 99th percentile of the first token, by server and number of adapters."""
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    colours = ("#0b6e99", "#e0a030", "#b3470f")
    with mpl.rc_context({**style, "svg.hashsalt": "tunewright", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.5), facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        servers = results["servers"]
        counts = sorted({int(count) for own in servers.values() for count in own})
        height = 0.8 / len(counts)
        for number, count in enumerate(counts):
            having = [(place, own[str(count)]) for place, own in enumerate(servers.values()) if str(count) in own]
            places = [place + (number - (len(counts) - 1) / 2) * height for place, _ in having]
            label = f"{count} adapter{'s' if count > 1 else ''}"
            colour = colours[number % len(colours)]
            left.barh(places, [one["tokens_per_s"] for _, one in having], height, color=colour, label=label)
            right.barh(places, [one["first_p99"] for _, one in having], height, color=colour)
        left.set_yticks(range(len(servers)), [RIVALS[name].name for name in servers])
        left.invert_yaxis()
        left.set_xlabel("answer tokens per second at full load")
        right.set_xlabel("first token under load, p99, s (logarithmic)")
        right.set_xscale("log")
        for axes in (left, right):
            axes.grid(axis="x", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=len(counts), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
