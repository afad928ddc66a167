"""Tokens that a call takes by each arm, which of them a prefix cache holds, and from how many calls training pays."""

from __future__ import annotations

from markupsafe import Markup

from tunewright.advisor.signals import BreakEven, Call, Signals
from tunewright.advisor.wording import amount, break_even_text
from tunewright.evidence.schema import Arm, Evidence
from tunewright.report.blocks import Block, Cell, Figure, Lead, Notes, Row, Section, Table, cells
from tunewright.report.plots import break_even_figure
from tunewright.report.wording import counted

_UNMEASURED = "No break-even was measured on these data and this base: `tunewright advise` measures it."


def section(evidence: Evidence, advice: Signals | None) -> Section:
    """What a call sends and what comes back, on the average; and what advice on the same data says of its cost."""
    first = evidence.contrasts[0]
    ours, theirs = evidence.arm(first.treatment), evidence.arm(first.control)
    head = ("Arm", "Prompt tokens", "The same in every prompt", "New in each", "Answer tokens")
    table = Table("Table of tokens", head, tuple(_row(arm) for arm in evidence.arms))
    return Section(
        "cost", "What a call costs, and when training pays", (Lead(_lead(ours, theirs)), table, *_pays(advice))
    )


def _lead(ours: Arm, theirs: Arm) -> str:
    more = theirs.prompt_tokens - ours.prompt_tokens
    told = (
        f"Mean tokens of a call. A call of {theirs.name} sends {theirs.prompt_tokens:.0f} tokens, one of {ours.name} "
    )
    told += f"{ours.prompt_tokens:.0f}: "
    if round(more) > 0:
        told += f"{theirs.prompt_tokens / ours.prompt_tokens:.1f} times as many. "
    else:
        told += "no more. "
    return (
        f"{told}What every prompt begins with a server computes once (prefix caching), so it is the tokens that are "
        "new in each prompt, and the answer's, that a call is paid for."
    )


def _row(arm: Arm) -> Row:
    share = arm.shared_tokens / arm.prompt_tokens
    return Row(
        cells(
            arm.name,
            f"{arm.prompt_tokens:.0f}",
            Cell(f"{arm.shared_tokens:,}", f"{share:.0%} of the prompt"),
            f"{arm.prompt_tokens - arm.shared_tokens:.0f}",
            "not counted" if arm.answer_tokens is None else f"{arm.answer_tokens:.1f}",
        )
    )


def _pays(advice: Signals | None) -> tuple[Block, ...]:
    """Return the break-even, what it is made of and where it comes from; or only how to measure it."""
    if advice is None:
        return (Lead(_UNMEASURED),)
    even = advice.break_even
    if even is None:
        why = f"advice {advice.id} has none, as {advice.left_out['break_even']}"
        return (Lead(f"No break-even was measured: {why}. `tunewright advise` with a pilot measures it."),)
    unit = "" if even.unit == "money" else ", machine time"
    head = ("A call of", "Input tokens", "Of them in a prefix cache", "Output tokens", f"Costs{unit}")
    calls = Table("Table of calls", head, tuple(_call(even, call) for call in (even.prompting, even.tuned)))
    once = Table("Table of what training costs", ("Beside the calls", f"Costs{unit}"), _once(even))
    return (Lead(break_even_text(advice)), *_drawn(even), calls, once, Notes(_grounds(advice, even)))


def _drawn(even: BreakEven) -> tuple[Block, ...]:
    """Both costs over the calls; nothing where the lines never cross."""
    if even.calls is None:
        return ()
    caption = "The band is the 95% interval of the number of calls from which on training pays."
    return (Figure(Markup(break_even_figure("break-even", even)), caption),)


def _call(even: BreakEven, call: Call) -> Row:
    tokens = (f"{call.input_tokens:.0f}", f"{call.cached_tokens:.0f}", f"{call.output_tokens:.1f}")
    return Row(cells(call.arm, *tokens, amount(even, call.cost)))


def _once(even: BreakEven) -> tuple[Row, ...]:
    once = even.once
    parts = {
        "training on all rows": once.training,
        "evaluation": once.evaluation,
        "labelling": once.labelling,
        f"hosting, {counted(even.months, 'month')}": once.hosting,
        "in all": once.total,
    }
    return tuple(Row(cells(name, amount(even, value))) for name, value in parts.items())


def _grounds(advice: Signals, even: BreakEven) -> tuple[str, ...]:
    """Where the numbers come from, and what the interval does not hold."""
    low, high = amount(even, even.saving_interval.low), amount(even, even.saving_interval.high)
    measured = (
        f"Advice {advice.id}: calls on {counted(advice.items, 'dev item')}, the tuned ones by a pilot adapter. A call "
        f"saves {amount(even, even.saving)}, 95% interval {low} to {high}. That is of the token counts alone: prices, "
        "speeds and the cost of training are taken as they are."
    )
    if not even.speed:
        return (measured,)
    speeds = "; ".join(
        f"{name} {speed.prefill:,.0f} prompt and {speed.decode:,.0f} answer tokens a second in a batch of {speed.rows}"
        for name, speed in even.speed.items()
    )
    return (measured, f"“This machine” is the one that the advice was made on: {speeds}.")
