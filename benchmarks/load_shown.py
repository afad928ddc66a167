"""Output of `serve_load.py`: the machine, tables, and a plot of each tenant's waits."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tunewright.adapters.lineage import packages


def machine(threads: int) -> dict[str, Any]:
    """Return the machine and its load before the run."""
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return {
        "cpu": f"{names[0]}, {os.cpu_count()} cores, {threads} threads for the model",
        "platform": platform.platform(),
        "others_load_at_start": round(os.getloadavg()[0], 1),
        "packages": packages("none"),
    }


def show(parts: Mapping[str, Any]) -> None:
    """Print each part against its bar, and the tenants' waits."""
    console = Console(width=120)
    bars = Table("what", "measured", "bar")
    if found := parts.get("memory"):
        each, size = found["each_further_bytes"] / 1e6, found["adapter_bytes"] / 1e6
        bars.add_row("memory of a further tenant", f"{each:.1f} MB: {found['ratio']:.2f}x its {size:.1f} MB", "<= 1.2x")
    if found := parts.get("throughput"):
        bars.add_row(f"{found['adapters_asked']} adapters against one", _rates(found, "all", "one"), ">= 0.8")
    if found := parts.get("gateway"):
        bars.add_row("throughput through the gateway", _rates(found, "gateway", "bare"), ">= 0.95")
        summary = ", ".join(f"{name} {_added(found, name)}" for name in ("first", "whole", "cpu"))
        bars.add_row(f"added by the gateway, p50 of {found['pairs']} pairs", summary, "first <= 5 ms")
    if found := parts.get("isolation"):
        summary = ", ".join(f"{count} {what}" for what, count in found["answers"].items())
        what = (
            f"{found['requests']} mixed requests of {found['tenants']} tenants, {found['releases_meanwhile']} releases"
        )
        bars.add_row(what, summary, "0 of another")
    console.print(bars)
    if "load" in parts:
        _show_load(console, parts["load"])


def _rates(found: Mapping[str, Any], side: str, other: str) -> str:
    rates = found["tokens_per_s"]
    summary = f"{rates[side]:.1f} against {rates[other]:.1f} tokens/s: {found['ratio']:.2f}"
    return f"{summary} (by processor time {found['ratio_by_cpu']:.2f})"


def _added(found: Mapping[str, Any], name: str) -> str:
    """Return milliseconds with their 95% interval."""
    low, high = found["added_p50_interval_s"][name]
    return f"{1000 * found['added_p50_s'][name]:+.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})"


def _show_load(console: Console, load: Mapping[str, Any]) -> None:
    table = Table("tenant", "requests", "in time", "first p50", "p99", "between p50", "p99", "whole p50", "p99")
    good = sum(row["good"] for row in load["tenants"].values())
    rows = {**load["tenants"], "everybody": {"requests": load["requests"], "good": good, **load["everybody"]}}
    for name, row in rows.items():
        waits = [f"{1000 * row[f'{what}_p{p}']:.0f} ms" for what in ("first", "between", "whole") for p in (50, 99)]
        table.add_row(name, str(row["requests"]), f"{100 * row['good'] / row['requests']:.0f}%", *waits)
    console.print(table)
    cold = load["cold_loads"]
    live = ", ".join(f"{seconds:.1f}" for seconds in cold["seconds_to_live"])
    gaps = ", ".join(f"{gap:.2f}" for gap in cold["longest_gap_of_others_s"])
    console.print(
        f"{load['requests_per_s']:.2f} requests/s; good (first token within {load['good_means']['first_s']:.2f} s, "
        f"between tokens {load['good_means']['between_mean_s']:.3f} s on average): {load['goodput_per_s']:.2f}/s; "
        f"Jain's index of the shares in time {load['jain_of_good_shares']:.3f}. Cold loads: live after {live} s, "
        f"others' longest gaps meanwhile {gaps} s."
    )


def draw(load: Mapping[str, Any], path: Path) -> None:
    """Plot the first-token waits by tenant, the busiest on the left: fair is flat."""
    style: dict[Any, Any] = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 4.5), facecolor="white", layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        rows = list(load["tenants"].values())
        places = range(1, len(rows) + 1)
        for percent, colour, mark in ((99, "#b3470f", "v"), (50, "#0b6e99", "o")):
            waits = [row[f"first_p{percent}"] for row in rows]
            axes.plot(places, waits, mark, color=colour, label=f"p{percent}")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("first token, s")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        below.bar(places, [row["requests"] for row in rows], color="#999999")
        below.set_ylabel("requests")
        below.set_xlabel("tenant, by how much it asks")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
