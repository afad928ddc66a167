"""Take a picture of every page of the studio, narrow and wide, in both themes.

    python tests/studio_pages.py [--project FOLDER] [--out build/studio-pages]

Follows the links from the project's page, and takes the first address of each route. It compares two runs and asks the
playground a question too, whose pages have no link. Without ``--project``, it makes a small project on a tiny base:
two dataset versions, a sweep, a learning curve, adapters, jobs, a judged evaluation against an incumbent, a release and
a tenant. Ends with an error if a page logs anything, scrolls sideways or has dim text. Without Chromium it does
nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from making.browser import EXECUTABLE, chromium, faults, show, signed_in, wait_for
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.hosted_model import stand_in, with_incumbents
from making.scripted_judge import honest, scripted
from making.tiny_bases import build_base
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.jobs import Jobs
from tunewright.studio.pages import HANDLERS

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
SIZES = (360, 1100)  # CSS pixels
LINKS = "[...document.querySelectorAll('main a[href^=\"/\"], nav a')].map(link => link.getAttribute('href'))"
WITHOUT_PROJECT = ("/new", "/sign-in", "/nowhere")


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
    with TemporaryDirectory() as folder:
        project = options.project or made_project(Path(folder) / "project")
        empty = Path(folder) / "empty"
        empty.mkdir()
        studios = Studio(project, "ann"), Studio(empty, "ann")
        with serving(studios[0].app()) as url, serving(studios[1].app()) as new_url, chromium() as browser:
            page = signed_in(browser, studios[0].address(url))
            found = crawled(page, ["/", "/rows/change?split=test&change=leave-out", compared(page), asked(page)])
            wrong = [fault for name, path in found.items() for fault in pictures(page, path, options.out / name)]
            page = signed_in(browser, studios[1].address(new_url))
            for path in WITHOUT_PROJECT:
                wrong += pictures(page, path, options.out / path[1:])
            studios[0].close()
    routes = set(map(route_of, [*found.values(), *WITHOUT_PROJECT]))
    missing = sorted({route for (method, route), _ in HANDLERS if method == "GET"} - routes)
    sys.stdout.write(
        f"{len(found) + len(WITHOUT_PROJECT)} pages in {options.out}; of no page: {', '.join(missing) or 'no route'}\n"
    )
    if wrong:
        sys.exit("\n".join(wrong))


def made_project(folder: Path) -> Path:
    """Make a project that has something on each page."""
    project = tiny_project(folder, build_base(folder / "base"), 280)
    more = write_jsonl(project / "more.jsonl", pairs(20, seed=9))
    ran("data", "add", project / "pairs.jsonl", project=project)
    ran("data", "add", more, "-m", "twenty more", project=project)
    ran("train", project=project)
    ran("train", "--sweep", "--rate", "0.002", "--rate", "0.004", "--write", project=project)
    ran("train", project=project)
    ran("train", "--curve", "--seeds", "2", project=project)
    answered_and_judged(project)
    ran("data", "suspects", project=project)
    adapter = next(path.name for path in (project / "adapters").glob("[!.]*"))
    ran("deploy", "colours", adapter, "--force", "--because", "a picture", "--untested", "a picture", project=project)
    ran("tenant", "add", "acme", "--alias", "colours", project=project)
    return project


def answered_and_judged(project: Path) -> None:
    """Evaluate against an incumbent too, and let a judge compare the answers; both are servers that end here."""
    with stand_in() as hosted, scripted(honest) as judge:
        incumbent = {"name": "hosted", "base_url": hosted.url, "model": "m"}
        with_incumbents(project, incumbent, judge={"base_url": judge.url, "model": "scripted", "controls": 14})
        finished_job(project, "evaluate")
        ran("judge", project=project)


def ran(*words: str | Path, project: Path) -> None:
    """Run a command, and end if it fails."""
    found = tunewright(*words, "-p", project)
    if found.code not in (0, 3, 4):
        sys.exit(found.stderr)


def finished_job(project: Path, *words: str) -> None:
    """Run a command as the studio does, and end if it fails."""
    job = Jobs(project / ".tunewright" / "jobs", project).start(*words)
    while job.state == "running":
        time.sleep(0.1)
    if job.state != "done":
        sys.exit(job.log.read_text(encoding="utf-8"))


def compared(page: Page) -> str:
    """Return the path of two runs next to each other."""
    page.goto("/train")
    for box in page.get_by_label("Compare ").all()[:2]:
        box.check()
    page.click("text=Compare the marked runs")
    return path_of(page)


def asked(page: Page) -> str:
    """Return the path of a question that the playground has answered."""
    page.goto("/playground")
    page.click("text=Load the base")
    page.fill("#question", "navy teal ochre 17")
    page.get_by_role("button", name="Ask").click()
    wait_for(page.get_by_text("Add to the dataset").nth(2)).to_be_visible()
    return path_of(page)


def path_of(page: Page) -> str:
    """Return the path and query of the page that is shown."""
    parts = urlsplit(page.url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def crawled(page: Page, waiting: list[str]) -> dict[str, str]:
    """Return the first address of each page, by a name for its pictures."""
    found: dict[str, str] = {}
    while waiting:
        path = waiting.pop(0)
        name = re.sub(r"[^a-z_]+", "-", route_of(path).strip("/")).strip("-") or "project"
        if name in found or route_of(path) == "":
            continue
        found[name] = path
        if not path.startswith("/report/"):  # a page of its own
            show(page, path, width=SIZES[1])
            waiting += page.evaluate(LINKS)
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


def pictures(page: Page, path: str, file: Path) -> list[str]:
    """Take the pictures of a page, and return its faults."""
    found = []
    for width in SIZES:
        for dark in (False, True):
            show(page, path, width=width, dark=dark)
            page.screenshot(path=file.with_name(f"{file.name}-{width}{'-dark' if dark else ''}.png"), full_page=True)
            found += [f"{path}, {width} pixels{', dark' if dark else ''}: {fault}" for fault in faults(page)]
    return [fault for fault in found if "status of 404" not in fault or path != "/nowhere"]


if __name__ == "__main__":
    main()
