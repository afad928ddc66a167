"""Time of the studio's pages on a project with many rows: browse, filter, search, a row and the next of a review.

Each page is requested again and again over HTTP, one after the other, as a person does. The rows are made up: a
sentence of twelve words of a vocabulary of 5,000, and a label.

python benchmarks/studio_latency.py [--rows 100000] [--requests 60]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np

import tunewright as library
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

LABELS = 50
PASSWORD = "only for this benchmark"
RESULT = Path(__file__).parent / "results" / "studio_latency.json"


def main() -> None:
    """Make the project, request the pages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=60, help="requests of each page")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        words = make_project(project, options.rows)
        with (
            serving(Studio(project, "ann", password=PASSWORD).app()) as url,
            httpx.Client(base_url=url, follow_redirects=True, timeout=600) as client,
        ):
            client.post("/sign-in", data={"secret": PASSWORD}).raise_for_status()
            began = time.perf_counter()
            client.get("/review").raise_for_status()
            print(f"{options.rows:,} rows; the first page, which loads them, took {time.perf_counter() - began:.1f} s")
            keys = [member.key for member in library.open(project).data.version().members]
            table = measure(client, words, keys, options.requests)
    print(f"{'page':<10} {'median':>8} {'p95':>8} {'largest':>10}")
    for name, (median, p95, size) in table.items():
        print(f"{name:<10} {median:>5.0f} ms {p95:>5.0f} ms {size / 1000:>7.1f} kB")
    if options.keep:
        RESULT.write_text(
            json.dumps({"rows": options.rows, "requests": options.requests, "pages": table}, indent=2) + "\n"
        )


def make_project(project: Path, rows: int) -> list[str]:
    """Write and add the rows; return the vocabulary."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(3, 9))) for _ in range(5000)]
    project.mkdir()
    (project / "tunewright.yaml").write_text("name: latency\n", encoding="utf-8")
    with (project / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {
                "prompt": " ".join(generator.choices(words, k=12)),
                "completion": f"label {generator.randrange(LABELS)}",
            }
            file.write(json.dumps(row) + "\n")
    library.open(project).data.add([project / "rows.jsonl"])
    return words


def measure(
    client: httpx.Client, words: list[str], keys: list[str], requests: int
) -> dict[str, tuple[float, float, int]]:
    """Return the median and the 95th percentile in milliseconds, and the largest page in bytes, by kind of page."""
    generator, rows = random.Random(2), len(keys)
    splits = ("train", "dev", "test")
    paths = {
        "browse": lambda: f"/rows?page={generator.randint(1, rows // 50)}",
        "filter": lambda: f"/rows?split={generator.choice(splits)}",
        "flag": lambda: f"/rows?flag={generator.choice(['conflict', 'edited'])}&split={generator.choice(splits)}",
        "file": lambda: f"/rows?source=rows.jsonl&page={generator.randint(1, rows // 50)}",
        "search": lambda: f"/rows?{urlencode({'q': ' '.join(generator.choices(words, k=2))})}",
        "common": lambda: f"/rows?{urlencode({'q': 'label', 'page': generator.randint(1, rows // 50)})}",
        "row": lambda: f"/rows/{generator.choice(keys)}",
        "review": lambda: "/review",
        "project": lambda: "/",
    }
    table = {}
    for name, path in paths.items():
        times, sizes = [], []
        for _ in range(requests):
            began = time.perf_counter()
            answer = client.get(path())
            times.append(1000 * (time.perf_counter() - began))
            sizes.append(len(answer.raise_for_status().content))
        table[name] = (float(np.median(times)), float(np.percentile(times, 95)), max(sizes))
    return table


if __name__ == "__main__":
    main()
