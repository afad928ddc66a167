"""Blocks as HTML, in the pages of the report and of the studio."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunewright.core.text import visible
from tunewright.render.blocks import Drawn


def page_templates(package: str, pages: Mapping[str, str] = MappingProxyType({})) -> Environment:
    """Return the environment of a package's ``templates``, which lay out blocks with ``blocks.html.j2``.

    ``pages`` has, for each kind of thing that a column names, the address of its page without the name.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tunewright.render")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "drawn": _drawn}
    environment.globals["pages"] = pages
    return environment


def _drawn(block: Drawn) -> Markup:
    from tunewright.render.plots import drawn

    return Markup(drawn(block))
