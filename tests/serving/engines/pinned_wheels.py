"""Write ``pinned_wheels.json``: files and requirements of every wheel that the engines' environments pin.

Run it on Linux and x86_64 with Python 3.11 after a change of a pin, for all environments or for some::

    .venv/bin/python tests/serving/engines/pinned_wheels.py [vllm/cuda ...]

It reads metadata and the tables of contents only, some megabytes in a few minutes.

A wheel's files are shortened to the highest folders that no other wheel of its environment writes to. So two wheels own
the same file if, and only if, they have an equal entry.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.request import url2pathname

from packaging.requirements import Requirement

from tunewright.engines.environment import TOOLS, Build, pins

RECORD = Path(__file__).with_suffix(".json")
BUILDS: tuple[Build, ...] = ("cpu", "cuda")


def owned(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Shorten the files of each pin."""
    owners: dict[PurePosixPath, set[str]] = defaultdict(set)
    for pin, names in files.items():
        for name in names:
            for place in (PurePosixPath(name), *PurePosixPath(name).parents):
                owners[place].add(pin)

    def shortest(name: str) -> str:
        path = PurePosixPath(name)
        own = [folder for folder in path.parents if owners[folder] == owners[path] and len(owners[path]) == 1]
        return f"{own[-1]}/" if own else name

    return {pin: sorted(set(map(shortest, names))) for pin, names in files.items()}


def _resolved(wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Return pip's report on the wheels that it would install."""
    with tempfile.TemporaryDirectory() as folder:
        # With two equals signs 2.13.0+cpu would do for 2.13.0.
        (listed := Path(folder) / "pins.txt").write_text("\n".join(wanted).replace("==", "==="), encoding="utf-8")
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", *command, "-r", str(listed)], check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
        return found


def _files(url: str) -> Iterator[str]:
    """Yield the paths that a wheel installs below site-packages, read from the wheel's end."""
    # pip's own reader of a part of a remote wheel, which it uses for `--use-feature=fast-deps`.
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._internal.network.session import PipSession

    remote: Any = url2pathname(url[7:]) if url.startswith("file:") else LazyZipOverHTTP(url, PipSession())
    with zipfile.ZipFile(remote) as wheel:
        for name in wheel.namelist():
            if not name.endswith("/"):
                yield re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", name)


def main(chosen: Sequence[str]) -> None:
    """Write the record."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if chosen else {}
    for tool, build in product(TOOLS.values(), BUILDS):
        if not chosen or f"{tool.name}/{build}" in chosen:
            record[f"{tool.name}/{build}"] = _environment(_resolved(pins(tool, build)))
    lines = (
        f'"{name}": {{\n' + ",\n".join(f"{json.dumps(pin)}: {json.dumps(of)}" for pin, of in wheels.items()) + "\n}"
        for name, wheels in record.items()
    )
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _environment(wheels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of the wheels in pip's report."""
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda wheel: list(_files(wheel["download_info"]["url"])), wheels)
    files = owned(
        {
            f"{wheel['metadata']['name']}=={wheel['metadata']['version']}": names
            for wheel, names in zip(wheels, read, strict=True)
        }
    )
    return {
        pin: {"files": names, "requires": _needed(wheel["metadata"].get("requires_dist", ()))}
        for (pin, names), wheel in zip(files.items(), wheels, strict=True)
    }


def _needed(requires: Sequence[str]) -> list[str]:
    """Return the requirements that hold without extras on this machine."""
    found = map(Requirement, requires)
    return sorted(f"{r.name}{r.specifier}" for r in found if r.marker is None or r.marker.evaluate({"extra": ""}))


if __name__ == "__main__":
    main(sys.argv[1:])
