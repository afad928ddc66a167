"""The files of deploy/, and the tools that check them, where `make build/deploy/.installed` or the system has them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from making.command_line import parsed
from tunewright.engines.remote import RemoteEngine
from tunewright.serving.gateway.app import ROUTES
from tunewright.serving.gateway.auth import Released
from tunewright.serving.gateway.metrics import Metrics, ServerState
from tunewright.serving.tenants.quota import RequestUsage

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / "build" / "deploy"
DASHBOARD = DEPLOY / "chart" / "files" / "tunewright-dashboard.json"

_BY_PROMETHEUS = {"instance", "job", "namespace", "pod", "le"}
"""Labels of the target, and of a histogram's buckets."""
_METRIC = re.compile(r"\b((?:tunewright|process)_\w+)(?:\{([^}]*)\})?")


def tool(name: str) -> str:
    """The path of a tool; the test is skipped without it."""
    for found in (TOOLS / "bin" / name, shutil.which(name)):
        if found is not None and Path(found).exists():
            return str(found)
    pytest.skip(f"{name} is not installed: `make build/deploy/.installed`, or the system's package, has it")


def ran(*command: str | Path) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML stream."""
    return [each for each in yaml.safe_load_all(text) if each is not None]


def options(arguments: Sequence[str]) -> dict[str, str]:
    """The options of a command line with their values: ``--port 8000`` and ``--port=8000``."""
    found, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--"):
            found[name] = value if equals or not rest or rest[0].startswith("-") else rest.pop(0)
    return found


def require_server(arguments: Sequence[str]) -> tuple[str, str]:
    """Check that arguments start a server that others reach and Prometheus too; return its two ports."""
    assert parsed(["tunewright", *arguments]) == ("serve",)
    given = options(arguments)
    assert given["--host"] == given["--metrics-host"] == "0.0.0.0"
    return given["--port"], given["--metrics-port"]


def require_route(path: str) -> None:
    """Check that the server answers GET on a path."""
    assert f"GET {path}" in ROUTES


@cache
def metric_labels() -> dict[str, set[str]]:
    """The labels of each series on the page of metrics, after one request, one refusal and one release."""
    engine = RemoteEngine("http://gpu-1:8100", "gateway")
    released = [Released("legal", "d" * 64, "live", 1)]
    now = ServerState(True, ["acme"], ["acme"], released, ["d" * 64], [engine])
    metrics = Metrics(lambda: now)
    metrics.settled("acme", "legal", RequestUsage(1, 1, 0.1, 0.2, 0.3, "stop"))
    metrics.refused("acme", "invalid_value")
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def require_metrics(query: str) -> int:
    """Check that each metric of a query exists with the labels that the query uses; return how many there are."""
    names = list(_METRIC.finditer(query))
    labels = metric_labels()
    for found in names:
        assert found[1] in labels, f"{found[1]} in {query}"
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", found[2] or ""):
            assert label in labels[found[1]] | _BY_PROMETHEUS, f"{label} of {found[1]} in {query}"
    known = set().union(*(labels[found[1]] for found in names)) | _BY_PROMETHEUS
    for grouping in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query):
        for label in re.split(r"[,\s]+", grouping.strip()):
            assert label in known, f"{label} in {query}"
    return len(names)


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Containerfile, with those of the stages that it continues."""
    found: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for instruction, rest in _instructions():
        if instruction == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+", rest)
            own = found[name] = list(found.get(base, []))
        else:
            own.append((instruction, rest))
    return found


def _instructions() -> Iterator[tuple[str, str]]:
    lines = [line for line in (DEPLOY / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            yield instruction, " ".join(rest.split())
