"""An hour of mixed load on a tiny base: what grows, and how fast.

    python benchmarks/soak.py [--minutes 60] [--rate 3] [--seed 0]

Clients of several tenants chat, complete, stream, disconnect, and send wrong keys and invalid bodies. Meanwhile an
operator makes and ends tenants, rotates keys, and deploys, tries, promotes and rolls back adapters, as the command line
does: in another process, by the server's database. Metrics are scraped.

Every few seconds the server's memory, descriptors, threads, tasks and objects are counted, and the rows and bytes of
its database. After the warm-up, each quantity's slope per hour is Theil and Sen's over the medians of minutes, with its
95% interval. Rows of usage, audit and releases grow by design, one for each event; the database's bytes are therefore
compared with its rows too. Prints a table, and writes benchmarks/results/soak.json and docs/images/soak.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from load_shown import machine
from soak_host import Host, make_project
from soak_load import Load
from soak_shown import Samples, draw, show, summary

from tunewright.core.io import write_json
from tunewright.serving.tenants import State

ADAPTERS = 25
"""Five for each lasting tenant and five for the passing ones; a fifth to two fifths of them are live at a time."""
SAMPLE_SECONDS = 5.0
LOOK_EVERY = 6
"""Samples between two looks inside, which collect garbage."""
ROWS = ("requests", "audit", "releases", "tenants", "api_keys", "shadow_answers", "unmetered_requests")
RESULTS = Path(__file__).with_name("results") / "soak.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "soak.svg"


def main() -> None:
    """Run the load and show what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=3, help="requests per second")
    parser.add_argument("--change-seconds", type=float, default=6, help="between two changes of tenants or releases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write the results and the plot into the repository")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    about = machine(1)
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary) / "project"
        adapters = make_project(project, ADAPTERS, options.seed)
        url = f"sqlite:///{project}/serving/state.sqlite"
        with State(url, "soak") as state:
            load = Load(state, "", adapters, options.seed, options.rate, options.change_seconds)
            load.prepare()
            with Host(project) as host:
                load.url = host.url
                found = asyncio.run(run(load, host, Path(url.removeprefix("sqlite:///")), 60 * options.minutes))
        with State(url) as state:
            check = state.verify()
    result = {
        "machine": about,
        "settings": {"minutes": options.minutes, "rate": options.rate, "seed": options.seed, "adapters": ADAPTERS},
        "requests": dict(sorted(load.counts.items())),
        "changes": dict(sorted(load.changes.items())),
        "faults": dict(load.faults.most_common()),
        "audit_faults": list(check.faults),
        **summary(found),
    }
    if options.keep:
        write_json(RESULTS, result)
        draw(result, PLOT)
    show(result)


async def run(load: Load, host: Host, database: Path, seconds: float) -> Samples:
    """Run the load and take samples until it ends."""
    samples = Samples()
    loading = asyncio.create_task(load.run(seconds))
    async with aiohttp.ClientSession() as session:
        began = time.monotonic()
        while not loading.done():
            look = samples.count % LOOK_EVERY == 0
            samples.add(time.monotonic() - began, await take(host, database, session, look=look))
            if look:
                _say(load, samples)
            await asyncio.wait([loading], timeout=SAMPLE_SECONDS - (time.monotonic() - began) % SAMPLE_SECONDS)
    await loading
    return samples


async def take(host: Host, database: Path, session: aiohttp.ClientSession, *, look: bool) -> Mapping[str, Any]:
    """Return one sample."""
    async with session.get(host.metrics, raise_for_status=True) as reply:
        page = await reply.text()
    series = [line for line in page.splitlines() if not line.startswith("#")]
    return {
        **await asyncio.to_thread(process_sample, host.pid),
        **await asyncio.to_thread(database_sample, database),
        "metric series": len(series),
        "resident adapters": sum(line.startswith("tunewright_resident_adapter") for line in series),
        **(await asyncio.to_thread(host.objects) if look else {}),
    }


def process_sample(pid: int) -> dict[str, float]:
    """Return memory, descriptors and threads of a process."""
    process = psutil.Process(pid)
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    # Not psutil's uss: pages of libraries are private or shared by what other processes load.
    anonymous = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
    times = process.cpu_times()
    return {
        "resident MB": process.memory_info().rss / 1e6,
        "private MB": anonymous * 1024 / 1e6,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "processor seconds": times.user + times.system,
    }


def database_sample(path: Path) -> dict[str, float]:
    """Return rows and bytes of the database."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = {f"rows: {table}": _number(database, f"SELECT count(*) FROM {table}") for table in ROWS}
        pages = _number(database, "PRAGMA page_count") * _number(database, "PRAGMA page_size")
        unfinished = _number(database, "SELECT count(*) FROM requests WHERE finished IS NULL")
    log = path.with_name(f"{path.name}-wal")
    return {
        **rows,
        "unfinished requests": unfinished,
        "database MB": pages / 1e6,
        "write-ahead log MB": log.stat().st_size / 1e6,
    }


def _number(database: sqlite3.Connection, query: str) -> int:
    (number,) = database.execute(query).fetchone()
    return int(number)


def _say(load: Load, samples: Samples) -> None:
    last = samples.last
    print(
        f"{samples.times[-1] / 60:5.1f} min: {sum(load.counts.values())} requests, {sum(load.changes.values())} "
        f"changes, {load.faults.total()} faults; {last['private MB']:.1f} MB, {last['descriptors']} descriptors, "
        f"{last['threads']} threads, {last['tasks']} tasks, {last['objects']} objects, "
        f"{last['metric series']} series, {last['resident adapters']} adapters",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
