"""The command that adds packages to the environment that tunewright is installed in."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit


def install_command(*extras: str, packages: Sequence[str] = (), again: bool = False) -> str:
    """Return the command that adds extras of tunewright, and other packages, to this environment.

    ``again`` replaces packages that are installed. `uv tool install` replaces what was named before, and `pipx` its
    record of it, so both commands name earlier extras again.
    """
    uv_tool, pipx = Path(sys.prefix, "uv-receipt.toml"), Path(sys.prefix, "pipx_metadata.json")
    before: list[str] = []
    unread = ""
    try:
        if uv_tool.exists():
            program, option = "uv tool install", "--reinstall"
            for each in tomllib.loads(uv_tool.read_text(encoding="utf-8"))["tool"]["requirements"]:
                if each["name"] == "tunewright":
                    before = each.get("extras", [])
                else:
                    packages = [*packages, each["name"] + each.get("specifier", "")]
        elif pipx.exists():
            program, option = "pipx inject tunewright", "--force"
            spec = json.loads(pipx.read_text(encoding="utf-8"))["main_package"]["package_or_url"]
            before = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", spec))) if extras else []
        elif find_spec("pip"):
            program, option = "pip install", "--force-reinstall"
        else:
            program, option = "uv pip install", "--reinstall"
    except (OSError, ValueError, LookupError, TypeError):  # damaged, or of a version with another form
        receipt = uv_tool if uv_tool.exists() else pipx
        unread = f" (add the extras and packages that you have: {receipt} cannot be read)"
    named = ",".join(dict.fromkeys([*before, *extras]))
    file = _installed_file()
    words = [f"tunewright[{named}]{file}"] if named else [f"tunewright{file}"] if uv_tool.exists() else []
    for each in dict.fromkeys(packages):
        words += ["--with", each] if uv_tool.exists() else [each]
    return shlex.join([*program.split(), *[option] * again, *words]) + unread


def _installed_file() -> str:
    """Return the file that tunewright was installed from, as in `` @ file:///tunewright.whl``; empty for an index."""
    try:
        url = json.loads(distribution("tunewright").read_text("direct_url.json") or "")["url"]  # PEP 610
        return f" @ {url}" if url.startswith("file:") and Path(unquote(urlsplit(url).path)).is_file() else ""
    except (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
