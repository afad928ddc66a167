"""Texts of rows that would change a page if they were more than text."""

from __future__ import annotations

_RUN = "document.title='attacked'"
ATTACKS = (
    f"<script>{_RUN}</script></textarea><script>{_RUN}</script>",
    f'"><svg onload="{_RUN}"></svg><img src=x onerror="{_RUN}">',
    f'<a href="javascript:{_RUN}">link</a> [link](javascript:{_RUN}) {{{{7*7}}}} <style>*{{display:none}}</style>',
    "\u05e9\u05dc\u05d5\u05dd" * 300 + " \u202eabc " + "\u0645\u0631\u062d\u0628\u0627 " * 200,
)
PLANTED = (
    "main :is(script, svg:not(.bar, .bars, .share, figure > svg), img, style, iframe, [onload], [onerror], "
    'a[href^="javascript" i])'
)
"""Elements that only an attack brings."""
