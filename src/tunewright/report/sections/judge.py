"""Section on the judge's findings, or on the reason of its veto."""

from __future__ import annotations

from tunewright.evidence.judge import Control, JudgedArm, JudgedContrast, Judgement, JudgeUsage, Preference, WinRate
from tunewright.evidence.preferences import judge_line
from tunewright.metrics import p_text, points_text
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, Row, Section, Table, row, table
from tunewright.report.text import percent_interval, points_interval


def section(judge: Judgement) -> Section:
    """Return the judge's controls first; for a vetoed judge, no finding."""
    blocks: list[Block] = [Lead(judge_line(judge)), _controls(judge.controls)]
    if judge.arms:
        head = ("Correct, by the reference", "Correct", "Share, %", "95% interval", "Exact", "No verdict")
        blocks.append(table("Table of judged arms", head, (_arm(arm) for arm in judge.arms)))
    if judge.preferences:
        counts = ("Wins", "Ties", "Losses", "Win rate, %", "95% interval", "Flips", "No verdict")
        rows = tuple(row for each in judge.preferences for row in _preference(each))
        blocks.append(table("Table of preferences", ("Preferred, in both orders", *counts), rows))
    notes = [*judge.vetoed, *_notes(judge), _spent("Spent", judge.spent)]
    if judge.reference_spent is not None:
        notes.append(_spent("On the reference model", judge.reference_spent))
    return Section("judge", "What a judge says", (*blocks, Notes(tuple(notes))))


def _controls(controls: tuple[Control, ...]) -> Table:
    head = (
        "Control",
        Column("Expected verdict", words=True, detail=True),
        "Passed",
        "No verdict",
        "At least (95%)",
        "Required",
        Column("Result", words=True),
    )
    return table("Table of controls", head, (_control(each) for each in controls))


def _control(each: Control) -> Row:
    return row(
        each.name,
        each.expected,
        f"{each.passed} of {each.items}",
        f"{sum(each.unscored.values())}",
        f"{each.limit:.0%}",
        f"{each.required:.0%}",
        Cell("holds", tone="yes") if each.held else Cell("FAILS", tone="no"),
    )


def _arm(arm: JudgedArm) -> Row:
    share = (f"{100 * arm.share.value:.1f}", percent_interval(arm.share.interval))
    counts = (f"{arm.exact}", f"{sum(arm.unscored.values())}")
    return row(arm.name, f"{arm.correct} of {arm.items}", *share, *counts)


def _preference(found: Preference) -> list[Row]:
    flips = "" if found.flip_rate is None else f"{found.flip_rate:.0%}"
    name = f"{found.treatment} against {found.opponent}"
    rows = [row(name, *_rate(found.rate), flips, f"{sum(found.unscored.values())}")]
    if found.stripped is not None:
        note = f"{found.stripped_texts} pairs have some"
        rows.append(row(Cell("without markdown", note), *_rate(found.stripped), "", ""))
    if found.length_controlled is not None:
        equal = found.length_controlled
        numbers = (f"{100 * equal.value:.1f}", percent_interval(equal.interval))
        rows.append(row(Cell("at equal length", equal.method), "", "", "", *numbers, "", ""))
    return rows


def _rate(rate: WinRate) -> tuple[str, ...]:
    counts = (f"{rate.wins}", f"{rate.ties}", f"{rate.losses}")
    return (*counts, f"{100 * rate.value:.1f}", percent_interval(rate.interval))


def _notes(judge: Judgement) -> list[str]:
    notes = [_contrast(judge.contrast)] if judge.contrast else []
    notes += map(_preference_note, judge.preferences)
    missing = {f"{arm.name}: {why}": count for arm in judge.arms for why, count in arm.unscored.items()}
    missing |= {f"against {p.opponent}: {why}": count for p in judge.preferences for why, count in p.unscored.items()}
    notes += [f"No verdict, {why}: {count}." for why, count in missing.items()]
    if judge.same_family and not judge.vetoed:
        notes.append(
            f"The judge and the base belong to one family ({judge.same_family}): the judge may favour its own kind."
        )
    if judge.reference_model and not judge.vetoed:
        notes.append(f"The answers of {judge.reference_model} were also compared.")
    return [*notes, *(f"This judgement replaces: {each}." for each in judge.replaced)]


def _contrast(found: JudgedContrast) -> str:
    return (
        f"Correctness, {found.treatment} − {found.control}: {points_text(found.difference)} points on {found.items:,} "
        f"items, 95% interval {points_interval(found.interval)}, {p_text(found.p_value)} ({found.test}); {found.fixed} "
        f"fixed, {found.broken} broken."
    )


def _preference_note(found: Preference) -> str:
    note = f"Against {found.opponent}: {p_text(found.p_value)} ({found.test}); {found.equal} equal answers tie unasked."
    return f"{note} At equal length: {found.length_note}." if found.length_note is not None else note


def _spent(title: str, spent: JudgeUsage) -> str:
    cost = "" if spent.cost is None else f", cost {spent.cost:.4f}"
    guessed = f" ({spent.estimated:,} replies came without counts: guessed)" if spent.estimated else ""
    tokens = f"{spent.prompt_tokens:,} prompt and {spent.completion_tokens:,} reply tokens"
    return f"{title}: {spent.calls:,} replies, {tokens}{guessed}{cost}."
