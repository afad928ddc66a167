"""Figures as inline SVG in the colours of the page, so that one drawing serves light and dark mode.

The report and the studio share the figures, which are attributes and text that any Content-Security-Policy allows.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunewright.render import blocks

# Matplotlib does not support CSS: these placeholders are replaced by the page's colours in the finished SVG.
INK, MUTED, LINE, TUNED, PROMPTING, PLAIN = "#010203", "#020203", "#030203", "#040203", "#050203", "#060203"
TONES: dict[blocks.Tone, str] = {"tuned": TUNED, "prompting": PROMPTING, "plain": PLAIN}
PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    TUNED: "var(--tuned)",
    PROMPTING: "var(--prompting)",
    PLAIN: "var(--plain)",
}

# colours of a standalone file, readable on white and on black
FILE_COLOURS = {
    INK: "#808080",
    MUTED: "#808080",
    LINE: "#b0b0b0",
    TUNED: "#3b82c4",
    PROMPTING: "#c47f1e",
    PLAIN: "#9a9a9a",
}

WIDTH = 460.0  # points, which become SVG units: text of 12 units stays readable on a phone 400 pixels wide
_ROW, _HEAD, FOOT = 30.0, 12.0, 40.0
_LABELS, _TEXTS = 96.0, 56.0  # widths to the left and right of a forest plot's axis
_LETTER, _MOST_LABELS = 6.0, 190.0  # width of a letter; maximum width of the labels

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text, which can be read aloud, selected and scaled
    "text.parse_math": False,  # show dollar signs literally
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
}

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def forest_plot(shown: blocks.Figure) -> str:
    """Draw a forest plot as an ``<svg>`` element: one interval per row on a common axis."""
    bars, margin = shown.bars, shown.margin
    head = _HEAD if margin is None else _HEAD + 14
    height = head + _ROW * len(bars) + FOOT
    names = [_short(bar.label) for bar in bars]
    left = min(max(_LABELS, 20 + _LETTER * max(len(line) for name in names for line in name.split("\n"))), _MOST_LABELS)
    with mpl.rc_context(STYLE | {"svg.hashsalt": shown.name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((left / WIDTH, FOOT / height, 1 - (left + _TEXTS) / WIDTH, _ROW * len(bars) / height))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(shown.axis)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", linewidth=0.7)
        axes.set_axisbelow(True)
        beside = axes.get_yaxis_transform()  # x in axes, y in data coordinates, for the labels
        for row, bar in enumerate(bars):
            colour = TONES[bar.tone]
            axes.plot([bar.low, bar.high], [row, row], colour, lw=3, solid_capstyle="round", clip_on=False)
            axes.plot([bar.value], [row], colour, marker="o", markersize=9, clip_on=False)
            axes.text(-0.05, row, names[row], ha="right", va="center", transform=beside)
            if bar.margin is not None:
                axes.plot([bar.margin] * 2, [row - 0.32, row + 0.32], INK, lw=2.5, clip_on=False)
            axes.text(1.05, row, bar.text, ha="left", va="center", transform=beside)
        if margin is not None or shown.zero:
            axes.axvline(0, color=MUTED, linewidth=1)
        if margin is not None:
            axes.axvline(margin, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.text(margin, -0.55, f"margin +{margin:g}", ha="center", va="bottom", fontsize=11)
        if shown.limits is not None:
            axes.set_xlim(*shown.limits)
        return inline(figure, shown.name, shown.title)


def _short(label: str) -> str:
    """Return a name wrapped to fit next to the axis; the table below has it in full."""
    most = int((_MOST_LABELS - 20) / _LETTER)
    return "\n".join(line if len(line) <= most else f"{line[: most - 1]}…" for line in label.split("\n"))


_LEFT, _RIGHT, _TOP = 60.0, 12.0, 18.0  # around the panels of lines
_UPPER, _LOWER = 172.0, 80.0  # heights of the panels
_MOST_INSIDE = 3  # lines whose legend has room next to them
_DASHES = ("-", (0, (6, 3)), (0, (2, 3)), (0, (10, 3, 2, 3)))  # dashes of lines of one colour


def lines_plot(shown: blocks.Lines, colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Draw lines as an ``<svg>`` element: panels over one axis."""
    panels = [shown] if shown.lower is None else [shown, shown.lower]
    names = [line.label for line in shown.lines if line.points]
    columns = _legend_columns(names)
    legend = _LEGEND * math.ceil(len(names) / columns) if len(names) > _MOST_INSIDE else 0
    height = _TOP + legend + _UPPER + FOOT * len(panels) + (_LOWER if shown.lower else 0)
    with mpl.rc_context(STYLE | {"svg.hashsalt": shown.name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        first: Axes | None = None
        top = height - _TOP - legend
        for panel, size in zip(panels, (_UPPER, _LOWER), strict=False):
            box = (_LEFT / WIDTH, (top - size) / height, 1 - (_LEFT + _RIGHT) / WIDTH, size / height)
            axes = figure.add_axes(box, sharex=first)
            _draw_lines(axes, panel, shown)
            first = first or axes
            top -= size + FOOT
        if legend and first is not None:
            first.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, labelcolor=INK)
        elif len(names) > 1 and first is not None:
            first.legend(loc="best", labelcolor=INK)
        axes.set_xlabel(shown.below)
        if shown.mark is not None and first is not None:
            above = first.get_xaxis_transform()
            first.text(shown.mark[0], 1.02, shown.mark[1], ha="center", va="bottom", fontsize=11, transform=above)
        return inline(figure, shown.name, shown.title, colours)


def _draw_lines(axes: Axes, panel: blocks.Lines, shown: blocks.Lines) -> None:
    axes.set_ylabel(panel.axis)
    axes.yaxis.set_major_locator(MaxNLocator(5 if panel is shown else 3))
    axes.grid(axis="y", linewidth=0.7)
    axes.set_axisbelow(True)
    marks, dashes = cycle(_MARKS), {tone: cycle(_DASHES) for tone in TONES}
    for line in panel.lines:
        if line.points:
            marker = next(marks) if line.dots else ""
            style: Any = next(dashes[line.tone]) if line.joined else ""
            width = 1.5 if line.tone == "plain" else 2
            look: dict[str, Any] = {"linestyle": style, "linewidth": width, "marker": marker, "color": TONES[line.tone]}
            axes.plot(*zip(*line.points, strict=True), label=line.label, **look)
    values = [y for line in panel.lines for _, y in line.points] or [0.0]
    low, high = min(values), max(values)
    # A score's axis begins at zero, since a cut one exaggerates gains. That would flatten a loss.
    low = low if low < 0 or (not panel.from_zero and low > high / 2 and high - low > high / 20) else 0
    axes.set_ylim(low - (0.08 * (high - low) if low else 0), (high + 0.08 * (high - low)) or 1)
    if shown.doubling:
        axes.set_xscale("log", base=2)
        ticks = [x for x, _ in shown.lines[0].points]
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if shown.band is not None:
        axes.set_xlim(axes.get_xlim())
        axes.axvspan(*shown.band, color=LINE, alpha=0.5, linewidth=0)
    if shown.mark is not None:
        axes.axvline(shown.mark[0], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))


def inline(figure: Figure, name: str, title: str, colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Return the figure as an ``<svg>`` element with page colours, prefixed ids, a title and no fixed size."""
    buffer = io.StringIO()
    # No date or program version: the same evidence must give the same bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for defs in root.findall(f"{{{_SVG}}}defs"):
        for sheet in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(sheet)
    for element in root.iter():
        _as_attributes(element)
        _own_ids(element, name)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"stroke-linejoin": "round", "role": "img", "aria-labelledby": f"{name}-title"}
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, colour in colours.items():
        text = text.replace(stand_in, colour)
    return text


def _as_attributes(element: ElementTree.Element) -> None:
    """Turn an element's inline style into attributes: the studio's Content-Security-Policy allows no inline styles.

    Texts have the font of the page.
    """
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.strip().partition(": ")
        if key and key != "font-family":
            element.set(key, value)


def _own_ids(element: ElementTree.Element, name: str) -> None:
    """Prefix an element's id and its references, since several figures share one page."""
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{_XLINK}}}href":
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif "url(#" in value:
            element.set(key, re.sub(r"url\(#", f"url(#{name}-", value))


# heights of the axes, of the space below them, and of a legend line
_PANEL, _BELOW, _LEGEND, _MARKS = 180.0, 54.0, 20.0, "osD^vP"
_LETTERS = 44  # letters per legend line, next to the marks


def bands_plot(shown: blocks.Bands) -> str:
    """Draw bands next to each other as an ``<svg>`` element."""
    series = shown.series
    with mpl.rc_context(STYLE | {"svg.hashsalt": shown.name}):
        columns = _legend_columns([each.name for each in series])
        height = _PANEL + _BELOW + 8 + _LEGEND * math.ceil(len(series) / columns)
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((0.11, _BELOW / height, 0.87, _PANEL / height))
        for place, each in enumerate(series):
            offset = (place - (len(series) - 1) / 2) * 0.6 / max(len(series), 1)
            mark, colour = _MARKS[place % len(_MARKS)], TONES[each.tone]
            for band, value, low, high in each.points:
                x = band + offset
                axes.plot([x, x], [low, high], colour, lw=2.5, solid_capstyle="round", clip_on=False)
                axes.plot([x], [value], colour, marker=mark, markersize=7, clip_on=False)
            axes.plot([], [], colour, label=each.name, marker=mark, markersize=7, linestyle="")
        axes.set_xlim(-0.5, len(shown.bands) - 0.5)
        axes.set_ylim(0, 100)
        axes.set_xticks(range(len(shown.bands)), shown.bands)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel(shown.below)
        axes.set_ylabel(shown.axis)
        axes.grid(axis="y", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, labelcolor=INK, handletextpad=0.3)
        return inline(figure, shown.name, shown.title)


def _legend_columns(names: Sequence[str]) -> int:
    """Return the most columns in which the names fit into a legend's lines, each as wide as its longest name."""
    for columns in (4, 3, 2):
        rows = max(math.ceil(len(names) / columns), 1)
        widths = [max(len(name) + 3 for name in names[at : at + rows]) for at in range(0, len(names), rows)]
        if sum(widths) <= _LETTERS + 3 * columns:
            return columns
    return 1


@lru_cache(maxsize=64)
def drawn(block: blocks.Drawn) -> str:
    """Draw a figure as an ``<svg>`` element in the page's colours."""
    match block:
        case blocks.Lines():
            return lines_plot(block)
        case blocks.Bands():
            return bands_plot(block)
        case blocks.Figure():
            return forest_plot(block)


def lines_file(shown: blocks.Lines) -> str:
    """Return lines as a standalone SVG file."""
    # On a page the font is the page's; a file has no font to inherit.
    return lines_plot(shown, FILE_COLOURS).replace("<svg ", '<svg font-family="sans-serif" ', 1) + "\n"
