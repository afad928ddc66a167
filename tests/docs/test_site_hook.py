"""The site's hook: navigation from the indexes, links out of docs/, and the schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import site_hook
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> MkDocsConfig:
    loaded = MkDocsConfig()
    loaded.load_dict({"site_name": "test", "docs_dir": str(ROOT / "docs"), "plugins": []})
    assert loaded.validate() == ([], [])
    loaded.plugins._current_plugin = "site_hook"  # as while MkDocs calls a hook
    return loaded


def site_of(config: MkDocsConfig, pages: dict[str, str]) -> Files:
    return Files([File.generated(config, path, content=text) for path, text in pages.items()])


def nav_of(config: MkDocsConfig, pages: dict[str, str]) -> list[Any]:
    return site_hook.expanded(["how-to/"], site_of(config, pages))


def test_nav_follows_the_index_then_the_names(config: MkDocsConfig) -> None:
    pages = {"how-to/b.md": "", "how-to/a.md": "", "how-to/z.md": "", "how-to/index.md": "[z](z.md), [b](b.md#x)"}
    assert nav_of(config, pages) == ["how-to/index.md", "how-to/z.md", "how-to/b.md", "how-to/a.md"]


def test_nav_groups_pages_by_heading_and_table_header(config: MkDocsConfig) -> None:
    first, second = "## First\n\n[b](b.md)\n\n## Empty\n\n", "| second | |\n| --- | --- |\n| [c](c.md) | [d](d.md) |\n"
    pages = {"how-to/index.md": f"[a](a.md)\n\n{first}{second}", **{f"how-to/{name}.md": "" for name in "abcd"}}
    assert nav_of(config, pages) == [
        "how-to/index.md",
        "how-to/a.md",
        {"First": ["how-to/b.md"]},
        {"Second": ["how-to/c.md", "how-to/d.md"]},
    ]


def test_nav_has_no_groups_when_each_would_have_one_page(config: MkDocsConfig) -> None:
    pages = {"how-to/index.md": "## B\n\n[b](b.md)\n\n## A\n\n[a](a.md)\n", "how-to/a.md": "", "how-to/b.md": ""}
    assert nav_of(config, pages) == ["how-to/index.md", "how-to/b.md", "how-to/a.md"]


def test_link_out_of_docs_is_published(config: MkDocsConfig) -> None:
    file = File.generated(config, "concepts/page.md", content="")
    page = Page("Page", file, config)
    text = "[script](../../benchmarks/near_duplicates.py) [log](../../CHANGELOG.md#x) [page](other.md) [site](https://x.y/)"
    rewritten = site_hook.on_page_markdown(text, page=page, config=config)
    assert "(../source/benchmarks/near_duplicates.py.txt)" in rewritten
    assert "(../changelog.md#x)" in rewritten
    assert "(other.md) [site](https://x.y/)" in rewritten


def test_link_to_a_missing_file_is_left_for_the_strict_build_to_refuse(config: MkDocsConfig) -> None:
    page = Page("Page", File.generated(config, "concepts/page.md", content=""), config)
    text = "[gone](../../benchmarks/no_such_file.py)"
    assert site_hook.on_page_markdown(text, page=page, config=config) == text


def test_schema_is_linked_on_the_site_which_has_it(config: MkDocsConfig) -> None:
    page = Page("Schemas", File.generated(config, "reference/schemas.md", content=""), config)
    linked = site_hook.on_page_markdown("| items | `schemas/items.json` |", page=page, config=config)
    assert linked == "| items | [`schemas/items.json`](schemas/items.json) |"
    files = site_of(config, {"reference/index.md": "[schemas](schemas.md)"})
    site_hook.on_files(files, config=config)
    assert files.get_file_from_path("reference/schemas/items.json") is not None
