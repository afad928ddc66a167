"""A pair of answers as its reviewer sees it, and what came of the review."""

from __future__ import annotations

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunewright.cli.token_tables import harmless
from tunewright.evaluation.human_eval.session import Pair, Progress
from tunewright.evidence.base import Interval, Score
from tunewright.evidence.human_eval import AnswerReview
from tunewright.metrics import p_text

SIDE_BY_SIDE = 90  # columns of the terminal; below them A stands over B
KEYS = (
    "a A is better   b B is better   g both good   n neither",
    "r reference   w write a note   s skip   u undo   q quit",
)
_SAID = {"treatment": "bold green", "control": "bold red", "can't tell": "bold yellow"}


def progress_text(progress: Progress) -> str:
    """How far the reviewer is."""
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    same = f"; {progress.same:,} more items have equal answers, which are ties" if progress.same else ""
    return f"{progress.answered} of {progress.asked} pairs judged{skipped}{same}"


def pair_screen(pair: Pair, progress: Progress, width: int, told: str) -> list[RenderableType]:
    """One pair: the input, both answers, the reference if it was asked for, and the keys."""
    panels = [Panel(_plain(text), title=name, title_align="left") for name, text in (("A", pair.a), ("B", pair.b))]
    answers: list[RenderableType] = [*panels]
    if width >= SIDE_BY_SIDE:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*panels)
        answers = [grid]
    parts: list[RenderableType] = [
        Text(progress_text(progress), style="bold"),
        Panel(_plain(pair.input), title=f"Input {pair.number}", title_align="left", style="cyan"),
        *answers,
    ]
    if pair.reference is not None:
        parts.append(Panel(_plain(pair.reference), title="Reference", title_align="left", style="green"))
    if pair.note:
        parts.append(_plain(f"Your note: {pair.note}"))
    parts += [Text(line, style="bold") for line in KEYS]
    return [*parts, Text(told, style="yellow")] if told else parts


def _plain(text: str) -> Text:
    if not text.strip():
        return Text("(no text)", style="dim italic")
    return Text("".join(map(harmless, text)))


def results_tables(review: AnswerReview) -> list[RenderableType]:
    """Verdicts by stratum, the win rate on all items, agreement, and what it comes to."""
    return [
        _strata_table(review),
        _reviewers_text(review),
        *_win_rates(review),
        *_agreement_text(review),
        _said(review),
    ]


def _strata_table(review: AnswerReview) -> Table:
    title = f"{review.treatment} against {review.control}, blind: {review.answered} of {review.asked} pairs judged"
    table = Table(title=title, title_justify="left")
    for name in (
        "by the metric",
        "items",
        "asked",
        "judged",
        f"for {review.treatment}",
        f"for {review.control}",
        "tie",
    ):
        table.add_column(name, justify="left" if name == "by the metric" else "right")
    for s in review.strata:
        table.add_row(s.name, *map(str, (s.items, s.asked, s.answered, s.treatment, s.control, s.ties)))
    if review.same:
        table.add_row("equal answers", str(review.same), "-", "-", "-", "-", str(review.same))
    return table


def _reviewers_text(review: AnswerReview) -> str:
    wins, losses = review.preferred
    lines = [
        f"Of {review.answered} judged pairs {review.treatment} is preferred on {wins}, {review.control} on {losses}, "
        f"none on {review.answered - wins - losses}: {p_text(review.p_value)} ({review.test})."
    ]
    for who in review.reviewers:
        lines.append(
            f"{who.name}: {who.answered} judged ({who.both} both good, {who.neither} neither), {who.skipped} skipped, "
            f"{who.reference_shown} with the reference shown."
        )
    return "\n".join(lines)


def _win_rates(review: AnswerReview) -> list[RenderableType]:
    if review.win_rate is None:
        return [f"No win rate for all {review.items:,} items yet: {review.lacking}."]
    table = Table(
        title=f"Win rate of {review.treatment} on all {review.items:,} items, ties half", title_justify="left"
    )
    for name in ("from", "win rate", "95% interval", "width"):
        table.add_column(name, justify="left" if name == "from" else "right", no_wrap=name != "from")
    table.add_row("people alone", *_cells(review.win_rate))
    if review.powered is not None:
        found = review.powered
        table.add_row(f"people and the judge (lambda {found.tuning:.2f})", *_cells(found.win_rate))
    return [table]


def _cells(score: Score) -> tuple[str, str, str]:
    low, high = score.interval.low, score.interval.high
    return f"{score.value:.1%}", f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * (high - low):.1f}"


def _agreement_text(review: AnswerReview) -> list[RenderableType]:
    lines = []
    for found in review.agreements:
        told = f"{' and '.join(found.raters)} agree on {found.agreed} of {found.items} items"
        if found.kappa is None:
            lines.append(f"{told}; kappa is not defined, since all their verdicts are the same.")
        else:
            lines.append(f"{told}; Cohen's kappa {found.kappa:.2f}{_between(found.interval)}.")
    return ["\n".join(lines)] if lines else []


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" (95% interval {interval.low:.2f} to {interval.high:.2f})"


def _said(review: AnswerReview) -> Text:
    told = {
        "treatment": f"People prefer {review.treatment}.",
        "control": f"People prefer {review.control}.",
        "can't tell": "People's preference can't be told yet: the interval has 50% in it."
        if review.win_rate
        else "People's preference can't be told yet.",
    }
    return Text(told[review.decision], style=_SAID[review.decision])
