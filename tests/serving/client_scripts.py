"""Scripts of tests/serving/clients, run in the environments that `make test-clients` makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "clients"
PYTHON = ROOT / "build" / "clients" / "python" / "bin" / "python"
NODE = ROOT / "build" / "clients" / "node"

needs_python = pytest.mark.skipif(not PYTHON.exists(), reason="`make test-clients` makes the clients' environment")
needs_node = pytest.mark.skipif(
    not ((NODE / "node_modules").exists() and shutil.which("node")),
    reason="`make test-clients` installs the npm packages, where there is npm",
)


def run(command: list[str | Path], script: Path, *arguments: str) -> str:
    """Return the script's output in an environment without the machine's proxies or keys."""
    kept = {
        name: value for name, value in os.environ.items() if not re.search("proxy|OPENAI|ANTHROPIC|PYTHON", name, re.I)
    }
    done = subprocess.run(
        [*command, script, *arguments], env=kept, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(script: str, *arguments: str, interpreter: Path = PYTHON) -> Any:
    """Return the JSON document that a Python script prints."""
    # LiteLLM prints notices of its own before.
    return json.loads(run([interpreter], SCRIPTS / script, *arguments).splitlines()[-1])


def node(script: str, *arguments: str) -> Any:
    """Return the JSON document that a script of npm packages prints."""
    # Node looks for packages from the script's own folder upwards.
    placed = NODE / script
    placed.write_text((SCRIPTS / script).read_text(encoding="utf-8"), encoding="utf-8")
    return json.loads(run(["node"], placed, *arguments))
