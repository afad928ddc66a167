"""Section on the judge's findings, or on the reason of its veto."""

from __future__ import annotations

from tunewright.evidence.judge import Control, JudgedArm, JudgedContrast, Judgement, Preference, WinRate
from tunewright.evidence.preferences import judge_line
from tunewright.evidence.schema import Evidence
from tunewright.metrics import p_text, points_text
from tunewright.report.blocks import Block, Cell, Lead, Notes, Row, Section, Table, cells, columns
from tunewright.report.text import percent_interval, points_interval


def section(evidence: Evidence) -> Section | None:
    """Return the judge's controls first; for a vetoed judge, nothing else."""
    judge = evidence.judge
    if judge is None:
        return None
    title = "What a judge says"
    if judge.vetoed:
        veto = f"Judge {judge.model}: vetoed, so its judgements do not count."
        return Section("judge", title, (Lead(veto), _controls(judge.controls), Notes(judge.vetoed)))
    blocks: list[Block] = [Lead(judge_line(judge)), _controls(judge.controls)]
    if judge.preferences:
        head = columns(
            "Preferred, both orders", "Wins", "Ties", "Losses", "Win rate, %", "95% interval", "Changed with order"
        )
        rows = tuple(row for each in judge.preferences for row in _preference(each))
        blocks.append(Table("Table of preferences", head, rows))
    if judge.arms:
        names = columns("Correct, by the reference", "Correct", "Share, %", "95% interval", "Equal to the reference")
        blocks.append(Table("Table of judged arms", names, tuple(_arm(arm) for arm in judge.arms)))
    return Section("judge", title, (*blocks, Notes(_notes(judge))))


def _controls(controls: tuple[Control, ...]) -> Table:
    head = columns("Control", "Expected verdict", "Passed", "At least (95%)", "Required", "Result")
    return Table("Table of controls", head, tuple(_control(each) for each in controls))


def _control(each: Control) -> Row:
    return Row(
        cells(
            each.name,
            each.expected,
            f"{each.passed} of {each.items}",
            f"{each.limit:.0%}",
            f"{each.required:.0%}",
            "holds" if each.held else "FAILS",
        )
    )


def _preference(found: Preference) -> list[Row]:
    flips = "" if found.flip_rate is None else f"{found.flip_rate:.0%}"
    name = Cell(f"{found.treatment} against {found.opponent}", f"{p_text(found.p_value)}, {found.test}")
    rows = [Row(cells(name, *_rate(found.rate), flips))]
    if found.stripped is not None:
        rows.append(
            Row(cells(Cell("without markdown", f"{found.stripped_texts} pairs have some"), *_rate(found.stripped), ""))
        )
    if found.length_controlled is not None:
        equal = found.length_controlled
        numbers = (f"{100 * equal.value:.1f}", percent_interval(equal.interval))
        rows.append(Row(cells(Cell("at equal length", equal.method), "", "", "", *numbers, "")))
    return rows


def _rate(rate: WinRate) -> tuple[str, ...]:
    counts = (f"{rate.wins}", f"{rate.ties}", f"{rate.losses}")
    return (*counts, f"{100 * rate.value:.1f}", percent_interval(rate.interval))


def _arm(arm: JudgedArm) -> Row:
    share = (f"{100 * arm.share.value:.1f}", percent_interval(arm.share.interval))
    return Row(cells(arm.name, f"{arm.correct} of {arm.items}", *share, f"{arm.exact}"))


def _notes(judge: Judgement) -> tuple[str, ...]:
    notes = [_contrast(judge.contrast)] if judge.contrast else []
    notes += [
        f"Against {each.opponent}, at equal length: {each.length_note}."
        for each in judge.preferences
        if each.length_note is not None
    ]
    missing = {f"{arm.name}: {why}": count for arm in judge.arms for why, count in arm.unscored.items()}
    missing |= {f"against {p.opponent}: {why}": count for p in judge.preferences for why, count in p.unscored.items()}
    notes += [f"No verdict, {why}: {count}." for why, count in missing.items()]
    if judge.same_family:
        notes.append(
            f"The judge and the base belong to one family ({judge.same_family}): the judge may favour its own kind."
        )
    if judge.reference_model:
        notes.append(f"The answers of {judge.reference_model} were also compared.")
    notes += [f"This judgement replaces: {each}." for each in judge.replaced]
    spent = judge.spent
    notes.append(
        f"{spent.calls:,} replies, {spent.prompt_tokens:,} prompt and {spent.completion_tokens:,} reply tokens."
    )
    return tuple(notes)


def _contrast(found: JudgedContrast) -> str:
    return (
        f"Correctness, {found.treatment} − {found.control}: {points_text(found.difference)} points on {found.items:,} "
        f"items, 95% interval {points_interval(found.interval)}, {p_text(found.p_value)} ({found.test}); {found.fixed} "
        f"fixed, {found.broken} broken."
    )
