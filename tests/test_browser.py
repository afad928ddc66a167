"""The checks of pages in a browser find what they look for."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.browser import AXE, EXECUTABLE, axe_faults, chromium, faults, new_page, show

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

PAGE = """<!doctype html><html lang="en"><title>Faults</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'self'; script-src 'self' 'nonce-a'">
<script>document.title = "blocked"</script>
<script nonce="a">console.error("logged"); undefined_name;</script>
<main><h1>Faults</h1><p>%s</p><input></main>"""


def test_each_fault_of_a_page_is_found(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGE % ("wide" * 200), encoding="utf-8")
    with chromium() as browser:
        page = new_page(browser)
        show(page, file, width=360)
        found = faults(page)
        assert page.title() == "Faults"
        for part in ("Content Security Policy", "logged", "undefined_name is not defined", "pixels wide"):
            assert any(part in each for each in found), part
        assert not AXE.exists() or any(each.startswith("label: ") for each in axe_faults(page))
        page.evaluate("document.querySelector('h1').style.color = '#999'")
        assert [each for each in faults(page) if "contrast" in each] == ["contrast 2.8: H1 Faults"]
