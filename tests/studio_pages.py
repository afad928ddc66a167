"""Take a picture of every page of the studio, narrow and wide, in both themes.

    python tests/studio_pages.py [--project FOLDER] [--out build/studio-pages]

Follows the links from the project's page, and takes the first address of each route. Without ``--project``, it makes
a small project on a tiny base: two dataset versions, an adapter, an evaluation, a release and a tenant. Ends with an
error if a page logs anything or scrolls sideways. Without Chromium it does nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from browser import EXECUTABLE, Page, chromium
from command_line import pairs, tiny_project, tunewright, write_jsonl
from tiny import build_base
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.pages import HANDLERS

ROOT = Path(__file__).parents[1]
SIZES = (360, 1100)  # CSS pixels
LINKS = "[...document.querySelectorAll('main a[href^=\"/\"], nav a')].map(link => link.getAttribute('href'))"


def main() -> None:
    """Make the project, and the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--project", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "studio-pages")
    options = parser.parse_args()
    if EXECUTABLE is None:
        sys.stdout.write("Chromium is not installed: no pictures of the studio are taken\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, chromium() as page:
        studio = Studio(options.project or made_project(Path(folder)), "ann")
        with serving(studio.app()) as url:
            page.open(studio.address(url), width=SIZES[1])
            while page.value("document.title") == "Sign in: tunewright":
                page.happened.clear()
                page.loaded()
            found = crawled(page, url)
            faults = [fault for name, path in found.items() for fault in pictures(page, url, path, options.out / name)]
    missing = sorted({route for (method, route), _ in HANDLERS if method == "GET"} - set(map(route_of, found.values())))
    sys.stdout.write(
        f"{len(found)} pages in {options.out}; without a link to them: {', '.join(missing) or 'no page'}\n"
    )
    if faults:
        sys.exit("\n".join(faults))


def made_project(folder: Path) -> Path:
    """Make a project that has something on most pages."""
    base = build_base(folder / "base")
    project = tiny_project(folder / "project", base)
    more = write_jsonl(project / "more.jsonl", pairs(20, seed=9))
    for words in (
        ("data", "add", project / "pairs.jsonl"),
        ("data", "add", more, "-m", "twenty more"),
        ("train",),
        ("evaluate",),
        ("deploy", "colours", "{adapter}", "--force", "--because", "a picture", "--untested", "a picture"),
        ("tenant", "add", "acme", "--alias", "colours"),
    ):
        names = [folder.name for folder in (project / "adapters").glob("[!.]*")]
        ran = tunewright(*(names[0] if word == "{adapter}" else word for word in words), "-p", project)
        if ran.code not in (0, 3, 4):
            sys.exit(ran.stderr)
    return project


def crawled(page: Page, url: str) -> dict[str, str]:
    """Return the first address of each page, by a name for its pictures."""
    found: dict[str, str] = {}
    waiting = ["/"]
    while waiting:
        path = waiting.pop(0)
        name = re.sub(r"[^a-z_]+", "-", route_of(path).strip("/")) or "project"
        if name in found or route_of(path) == "":
            continue
        found[name] = path
        if not path.startswith("/report/"):  # a page of its own
            page.open(f"{url}{path}", width=SIZES[1])
            waiting += page.value(LINKS)
    return found


def route_of(path: str) -> str:
    """Return the route of an address, such as ``/rows/{row}``; empty if there is no such page."""
    steps = urlsplit(path).path.split("/")
    routes = [route for (method, route), _ in HANDLERS if method == "GET"]
    for route in sorted(routes, key=lambda each: each.count("{")):
        wanted = route.split("/")
        if len(wanted) == len(steps) and all(a == b or a.startswith("{") for a, b in zip(wanted, steps, strict=True)):
            return route
    return ""


def pictures(page: Page, url: str, path: str, file: Path) -> list[str]:
    """Take the pictures of a page, and return its faults."""
    faults = []
    for width in SIZES:
        for dark in (False, True):
            page.said.clear()
            page.open(f"{url}{path}", width=width, dark=dark)
            page.picture(file.with_name(f"{file.name}-{width}{'-dark' if dark else ''}.png"))
            wide = page.value("document.documentElement.scrollWidth")
            faults += [f"{path}: {said}" for said in page.said]
            faults += [f"{path}: {wide} pixels wide in a window of {width}"] if wide > width else []
    return faults


if __name__ == "__main__":
    main()
