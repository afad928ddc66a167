"""MkDocs hook: add the JSON Schemas to the site, and resolve navigation and links to the repository."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

from reference_documents import schemas  # noqa: E402

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)
_SCHEMA = re.compile(r"`(schemas/[a-z-]+\.json)`")
_GROUP = re.compile(r"^(?:## (.+)|\| ([^|]+?) \| \|)$", re.MULTILINE)
_SHOWN_AS_TEXT = {".py", ".md", ".yaml", ".yml", ".json", ".jsonl", ".toml", ".txt", ".ipynb", ""}
_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site that lie outside docs/, and where they go."""
NAV: list[Any] = []
"""The navigation as mkdocs.yml has it; folders are expanded once all files are known."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation out of the configuration: it has folders, which MkDocs does not read."""
    if config.nav is not None:
        NAV[:] = config.nav
    config.nav = None
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the schemas and the repository's files that pages link to, then expand the navigation."""
    for path, text in schemas().items():
        files.append(File.generated(config, path, content=text))
    for name, page in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for target in sorted(_linked_outside(files, config)):
        files.append(File.generated(config, _published(target), content=(ROOT / target).read_bytes()))
    config.nav = [*expanded(NAV, files), {"Project": list(_PAGES.values())}]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_others: Any) -> str:
    """Point links that leave docs/ to where the site has those files, and link the schemas, which only the site has."""
    source = _repository_path(page.file, config)

    def rewritten(match: re.Match[str]) -> str:
        target = _outside(match[2], source)
        if target is None:
            return match[0]
        there = posixpath.relpath(_published(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{there}{match[3] or ''}"

    return _SCHEMA.sub(r"[`\1`](\1)", _LINK.sub(rewritten, markdown))


def on_post_page(output: str, *, page: Page, **_others: Any) -> str:
    """Mark the reference's pages for the style sheet."""
    return (
        output.replace("<body ", "<body data-reference ", 1) if page.file.src_uri.startswith("reference/") else output
    )


def _repository_path(file: File, config: MkDocsConfig) -> str:
    """Return where a page's source lies in the repository, with ``/``."""
    if file.src_uri in _PAGES.values():
        return next(name for name, page in _PAGES.items() if page == file.src_uri)
    return posixpath.join(Path(config.docs_dir).relative_to(ROOT).as_posix(), file.src_uri)


def _outside(link: str, source: str) -> str | None:
    """Return the file in the repository, outside docs/, that a relative link names; None for any other link."""
    if ":" in link or link.startswith("/"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target.startswith(".."):
        return None
    if source in _PAGES and target.startswith("docs/"):
        return target
    return target if not target.startswith("docs/") and (ROOT / target).is_file() else None


def _published(target: str) -> str:
    """Return where the site has a file of the repository."""
    if target in _PAGES:
        return _PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    suffix = Path(target).suffix
    return f"source/{target}.txt" if suffix in _SHOWN_AS_TEXT else f"source/{target}"


def _linked_outside(files: Files, config: MkDocsConfig) -> set[str]:
    """Return the files of the repository that pages link to and that the site does not have."""
    found: set[str] = set()
    for file in files.documentation_pages():
        source = _repository_path(file, config)
        targets = (_outside(link[2], source) for link in _LINK.finditer(_FENCE.sub("", file.content_string)))
        found |= {target for target in targets if target is not None and not target.startswith("docs/")}
    return found - set(_PAGES)


def expanded(nav: list[Any], files: Files) -> list[Any]:
    """Return a navigation whose folders, written with a slash at the end, are replaced by their pages."""
    out: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            inside = value if isinstance(value, list) else [value]
            page = isinstance(value, str) and not value.endswith("/")
            out.append({title: value if page else expanded(inside, files)})
        else:
            out += _folder(entry, files) if entry.endswith("/") else [entry]
    return out


def _folder(folder: str, files: Files) -> list[Any]:
    """Return a folder's navigation: index.md, then its pages in the groups and the order of the index.

    A group is a heading of the index, or the header of a table with a second column that is not named; groups of one
    page each are not worth a level. Pages that the index does not link follow by name.
    """
    texts = {f.src_uri: f.content_string for f in files.documentation_pages() if f.src_uri.startswith(folder)}
    text = texts.get(f"{folder}index.md", "")
    marks: list[tuple[int, str, str]] = []
    for link in _LINK.finditer(text):
        marks.append((link.start(), "page", posixpath.normpath(posixpath.join(folder, link[2]))))
    for heading in _GROUP.finditer(text):
        marks.append((heading.start(), "group", (heading[1] or heading[2]).strip()))
    nav: list[Any] = [f"{folder}index.md"] if text else []
    left, inside = set(texts) - set(nav), nav
    for _place, kind, name in sorted(marks):
        if kind == "group":
            inside = []
            nav.append({name[:1].upper() + name[1:]: inside})
        elif name in left:
            below = name.removeprefix(folder).partition("/")[0]
            inner = {uri for uri in left if uri.startswith(f"{folder}{below}/")}
            inside.append({_title(below): _folder(f"{folder}{below}/", files)} if inner else name)
            left -= inner or {name}
    nav += sorted(left)
    groups = [pages for entry in nav if isinstance(entry, dict) for pages in entry.values()]
    if groups and all(len(pages) <= 1 for pages in groups):
        parts = [next(iter(entry.values())) if isinstance(entry, dict) else [entry] for entry in nav]
        return [page for part in parts for page in part]
    return [entry for entry in nav if not isinstance(entry, dict) or any(entry.values())]


def _title(folder: str) -> str:
    return {"cli": "Command line"}.get(folder, folder.replace("-", " ").capitalize())
