"""Section on the tokens of a call by arm, prefix caching and the break-even of training."""

from __future__ import annotations

from tunewright.advisor.advice import amount, break_even_text
from tunewright.advisor.signals import BreakEven, Call, Signals
from tunewright.core.text import count_of
from tunewright.evidence.schema import Arm, Evidence
from tunewright.render.blocks import Block, Cell, Lead, Line, Lines, Notes, Row, Section, row, table

_UNMEASURED = "No break-even was measured on these data and this base: `tunewright advise` measures it."


def section(evidence: Evidence, advice: Signals | None) -> Section:
    """Return the average tokens sent and received per call, and their cost from advice on the same data."""
    first = evidence.contrasts[0]
    ours, theirs = evidence.arm(first.treatment), evidence.arm(first.control)
    head = ("Arm", "Prompt tokens", "The same in every prompt", "New in each", "Answer tokens")
    tokens = table("Table of tokens", head, (_row(arm) for arm in evidence.arms))
    return Section("cost", "Cost of a call, and break-even", (Lead(_lead(ours, theirs)), tokens, *_pays(advice)))


def _lead(ours: Arm, theirs: Arm) -> str:
    more = theirs.prompt_tokens - ours.prompt_tokens
    lead = (
        f"Mean tokens of a call. A call of {theirs.name} sends {theirs.prompt_tokens:.0f} tokens, one of {ours.name} "
    )
    lead += f"{ours.prompt_tokens:.0f}: "
    if round(more) > 0:
        lead += f"{theirs.prompt_tokens / ours.prompt_tokens:.1f} times as many. "
    else:
        lead += "no more. "
    return (
        f"{lead}A server computes the shared beginning of the prompts once (prefix caching), so a call costs the "
        "tokens that are new in each prompt and those of the answer."
    )


def _row(arm: Arm) -> Row:
    share = arm.shared_tokens / arm.prompt_tokens
    return row(
        arm.name,
        f"{arm.prompt_tokens:.0f}",
        Cell(f"{arm.shared_tokens:,}", f"{share:.0%} of the prompt"),
        f"{arm.prompt_tokens - arm.shared_tokens:.0f}",
        "not counted" if arm.answer_tokens is None else f"{arm.answer_tokens:.1f}",
    )


def _pays(advice: Signals | None) -> tuple[Block, ...]:
    """Return the break-even with its components and sources, or else the way to measure it."""
    if advice is None:
        return (Lead(_UNMEASURED),)
    even = advice.break_even
    if even is None:
        why = f"advice {advice.id} has none, as {advice.left_out['break_even']}"
        return (Lead(f"No break-even was measured: {why}. `tunewright advise` with a pilot measures it."),)
    unit = "" if even.unit == "money" else ", machine time"
    head = ("A call of", "Input tokens", "Of them in a prefix cache", "Output tokens", f"Costs{unit}")
    calls = table("Table of calls", head, (_call(even, call) for call in (even.prompting, even.tuned)))
    once = table("Table of what training costs", ("Costs other than calls", f"Costs{unit}"), _once(even))
    return (Lead(break_even_text(advice)), *lines(even), calls, once, Notes(_grounds(advice, even)))


def lines(even: BreakEven) -> tuple[Lines, ...]:
    """Return both total costs by number of calls, or nothing if the lines never cross."""
    if even.calls is None or even.calls_low is None:
        return ()
    end, once = 2 * even.calls, even.once.total
    return (
        Lines(
            "break-even",
            f"Costs of {even.prompting.arm} and of training by the number of calls",
            (
                Line(even.prompting.arm, ((0, 0), (end, end * even.prompting.cost)), "prompting"),
                Line("training, then tuned", ((0, once), (end, once + end * even.tuned.cost)), "tuned"),
            ),
            "cost" if even.unit == "money" else "machine time, hours",
            below="calls",
            mark=(even.calls, f"{even.calls:,.0f}"),
            band=(even.calls_low, min(even.calls_high or end, end)),
            caption="The band is the 95% interval of the number of calls from which on training pays.",
        ),
    )


def _call(even: BreakEven, call: Call) -> Row:
    tokens = (f"{call.input_tokens:.0f}", f"{call.cached_tokens:.0f}", f"{call.output_tokens:.1f}")
    return row(call.arm, *tokens, amount(even, call.cost))


def _once(even: BreakEven) -> tuple[Row, ...]:
    once = even.once
    parts = {
        "training on all rows": once.training,
        "evaluation": once.evaluation,
        "labelling": once.labelling,
        f"hosting, {count_of(even.months, 'month')}": once.hosting,
        "in all": once.total,
    }
    return tuple(row(name, amount(even, value)) for name, value in parts.items())


def _grounds(advice: Signals, even: BreakEven) -> tuple[str, ...]:
    """Return the sources of the numbers, and the uncertainties that the interval excludes."""
    low, high = amount(even, even.saving_interval.low), amount(even, even.saving_interval.high)
    measured = (
        f"Advice {advice.id}: calls on {count_of(advice.items, 'dev item')}, the tuned ones by a pilot adapter. A call "
        f"saves {amount(even, even.saving)}, 95% interval {low} to {high}. It covers the token counts only: prices, "
        "speeds and the cost of training are treated as exact."
    )
    if not even.speed:
        return (measured,)
    speeds = "; ".join(
        f"{name} {speed.prefill:,.0f} prompt and {speed.decode:,.0f} answer tokens a second in a batch of {speed.rows}"
        for name, speed in even.speed.items()
    )
    return (measured, f"“This machine” is where the advice was measured: {speeds}.")
