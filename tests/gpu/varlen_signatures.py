"""Write ``varlen_signatures.json``: the signature of torch's ``varlen_attn`` in every release from 2.11 on.

Run it on Linux when torch has a new release::

    .venv/bin/python tests/gpu/varlen_signatures.py

It reads one file out of each wheel, some hundred kilobytes in all. The wheels are those for Python 3.12 on x86_64, so
they need not fit this machine. A constraint on torch in pip's configuration has to be lifted for it (PIP_CONSTRAINT).
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.version import Version

RECORD = Path(__file__).with_suffix(".json")
FIRST = Version("2.11")
MODULE = "torch/nn/attention/varlen.py"
PIP = (sys.executable, "-m", "pip")
WHEEL = ("--only-binary=:all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64")


def main() -> None:
    """Write the record."""
    lines = (f'"{release}": {json.dumps(entry(release))}' for release in releases())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def releases() -> list[str]:
    """Return the releases that the package index has, oldest first, without those of a local build."""
    listed = subprocess.run([*PIP, "index", "versions", "torch", *WHEEL], check=True, capture_output=True, text=True)
    (line,) = re.findall(r"^Available versions: (.*)$", listed.stdout, re.MULTILINE)
    found = sorted(map(Version, line.split(", ")))
    return [str(version) for version in found if version >= FIRST and version.local is None]


def entry(release: str) -> dict[str, str]:
    """Return a release's wheel and signature."""
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._internal.network.session import PipSession

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--target", folder, "--report", report)
        # With two equals signs 2.13.0+cpu would do for 2.13.0.
        subprocess.run([*PIP, "install", *options, *WHEEL, f"torch==={release}"], check=True)
        (wheel,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = wheel["download_info"]
    remote: Any = LazyZipOverHTTP(found["url"], PipSession())
    with zipfile.ZipFile(remote) as archive:
        text = archive.read(MODULE).decode()
    name = found["url"].rpartition("/")[2]
    return {"wheel": name, "sha256": found["archive_info"]["hashes"]["sha256"], "signature": signature_text(text)}


def signature_text(module: str) -> str:
    """Return the parameters of ``varlen_attn`` in the text of its module."""
    defined = (each for each in ast.parse(module).body if isinstance(each, ast.FunctionDef))
    return ast.unparse(next(each.args for each in defined if each.name == "varlen_attn"))


if __name__ == "__main__":
    main()
