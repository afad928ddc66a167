"""Blocks as HTML, in the pages of the report and of the studio."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunewright.core.text import visible
from tunewright.render.blocks import Bands, Figure


def page_templates(package: str) -> Environment:
    """Return the environment of a package's pages, which lay out blocks with ``blocks.html.j2``."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tunewright.render")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "drawn": _drawn}
    return environment


def _drawn(block: Figure | Bands) -> Markup:
    from tunewright.render.plots import bands_plot, forest_plot

    return Markup(bands_plot(block) if isinstance(block, Bands) else forest_plot(block))
