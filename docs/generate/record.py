"""Record a command's output as an SVG for the README and the quickstart.

    cd build && python ../docs/generate/record.py ../docs/images/run.svg --lines 1-9,38-42,45 -- tunewright run -p demo

The result (stdout) keeps its colours; progress (stderr) is left out. ``--lines`` keeps some of the result's lines and
marks each gap with an ellipsis.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import subprocess
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100
# Rich's own form, without the web font that it loads from a public server, and without a window's frame.
_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#292929" width="100%" height="100%" rx="8" />
<g transform="translate(9, 9)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def main() -> None:
    """Run the command and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--lines", default="", help="lines of the result to keep, from 1, such as 1-20,30-36")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    result = captured(options.command)
    console = Console(record=True, width=WIDTH, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    console.print(Text(f"$ {shlex.join(options.command)}", style="bold"))
    for line in chosen(result.splitlines(), options.lines):
        console.print(Text.from_ansi(line))
    svg = console.export_svg(code_format=_FORMAT, font_aspect_ratio=0.61, unique_id="run")
    svg = re.sub(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', _with_border, svg)
    options.svg.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")


def _with_border(size: re.Match[str]) -> str:
    return f'viewBox="0 0 {float(size[1]) + 18:g} {float(size[2]) + 18:g}"'


def captured(command: list[str]) -> str:
    """Return what a command writes on stdout, which is a terminal for it.

    Raises:
        SystemExit: the command failed; 3 and 4 are verdicts.
    """
    reader, writer = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment) as process:
        os.close(writer)
        chunks = []
        assert process.stderr is not None
        while True:
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # Linux's answer once the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        progress = process.stderr.read()
    os.close(reader)
    if process.returncode not in {0, 3, 4}:
        raise SystemExit(f"{shlex.join(command)}: exit code {process.returncode}\n{progress}")
    return b"".join(chunks).decode().replace("\r\n", "\n")


def chosen(lines: list[str], ranges: str) -> list[str]:
    """Return the lines in the ranges, an ellipsis for each gap; all lines without ranges."""
    if not ranges:
        return lines
    out: list[str] = []
    last = 0
    for part in ranges.split(","):
        first, _, end = part.partition("-")
        if int(first) > last + 1:
            out.append("…")
        last = int(end or first)
        out += lines[int(first) - 1 : last]
    return out if last >= len(lines) else [*out, "…"]


if __name__ == "__main__":
    main()
