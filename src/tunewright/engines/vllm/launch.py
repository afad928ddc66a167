"""The start of vLLM's API server: its private folder, our plugin in it, and its environment variables."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunewright.engines.child import Plan, socket_in
from tunewright.engines.vllm import worker
from tunewright.models import ALLOCATOR

PACKAGE = "tunewright_vllm"

# Python runs it first. A process that vLLM starts imports for many seconds before it loads plugins, and would outlive a
# parent that is killed meanwhile. Python's resource tracker has to outlive it, to free its shared memory.
_FIRST = f"""\
import sys

if "--multiprocessing-fork" in sys.orig_argv:
    import {PACKAGE}

    {PACKAGE}.end_with_parent()
"""

# Not inherited: vLLM's switches (one of them makes it answer unknown names with the base), Python's search paths, and
# the token of a Ray cluster.
_NOT_INHERITED = ("VLLM_", "PYTHON", "VIRTUAL_ENV", "LORA_", "RAY_")


def plan(folder: Path, python: Path, options: Sequence[str], variables: Mapping[str, str]) -> Plan:
    """Return the plan of vLLM's API server on the socket of a private folder, without any adapter."""
    list_adapters(folder, {})
    _write_plugin(folder / "site")
    # The allocator's setting is for training; vLLM reserves its memory at once.
    environment = [each for each in os.environ.items() if each != ALLOCATOR]
    inherited = {name: value for name, value in environment if not name.startswith(_NOT_INHERITED)}
    ours = {
        "PYTHONPATH": str(folder / "site"),
        worker.MANIFEST: str(_manifest(folder)),
        worker.GATEWAY: str(os.getpid()),
        "VLLM_PLUGINS": PACKAGE,  # without vLLM's own resolvers
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # resolvers need it; it also opens routes, which the gate closes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket_in(folder))]
    return Plan("vLLM", [*server, *options], {**inherited, **ours, **variables}, "vllm:")


def list_adapters(folder: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    """Write the list of adapters that vLLM may load: see :data:`tunewright.engines.vllm.worker.MANIFEST`."""
    manifest = _manifest(folder)
    fresh = manifest.with_suffix(".new")
    fresh.write_text(json.dumps(dict(entries)), encoding="utf-8")
    fresh.replace(manifest)


def _manifest(folder: Path) -> Path:
    return folder / "adapters.json"


def _write_plugin(site: Path) -> None:
    """Write the package that vLLM finds by its entry point, and what Python runs first."""
    package, info = site / PACKAGE, site / f"{PACKAGE}-1.dist-info"
    package.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(_FIRST, encoding="utf-8")
    info.mkdir()
    shutil.copyfile(worker.__file__, package / "__init__.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1\n", encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{PACKAGE} = {PACKAGE}:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")
