"""Section on the choice of the prompting arm: on the dev split, or by each fold of a cross-validation."""

from __future__ import annotations

from tunewright.evidence.prompt_optimization import NOT_RUN, OptimizedPrompt
from tunewright.evidence.schema import Advice, Evidence, Fold, Narrowing, SeedSpread
from tunewright.metrics import axis_label
from tunewright.render.blocks import Block, Column, Lead, Notes, Row, Section, Table, row, table
from tunewright.report.sections.arms import arms_figure, arms_table, left_out


def section(evidence: Evidence) -> Section | None:
    """Return the prompting arms, or None if the evidence has none; each fold of a cross-validation chose its own."""
    if not evidence.dev_arms:
        return None
    axis = axis_label(evidence.metric)
    went = "was evaluated on the test split" if evidence.split == "test" else "is compared with tuned"
    blocks: list[Block] = [
        Lead(f"Prompting arms on the dev split. The best one, {evidence.best_prompting}, {went}."),
        arms_figure("dev", f"Prompting arms on the dev split by {axis}", evidence.dev_arms, evidence.metric),
        arms_table("Table of prompting arms", evidence, evidence.dev_arms, {evidence.best_prompting: "chosen"}),
    ]
    if evidence.narrowing is not None:
        blocks += _narrowing(evidence, evidence.narrowing)
    if evidence.static:
        blocks += [
            Lead("Demonstrations that are the same for every question depend on which ones were drawn:"),
            _draws(evidence.static),
        ]
    optimized = evidence.prompt_optimization
    blocks += optimization_section(optimized).blocks if optimized else (Notes((NOT_RUN,)),)
    if evidence.left_out:
        blocks.append(Notes(tuple(f"Left out: {each.name}, as {each.why}." for each in evidence.left_out)))
    if evidence.budget is not None:
        caution = f" {evidence.budget.caution}" if evidence.budget.caution else ""
        rule = f"--minutes {evidence.budget.minutes:g} left out {', '.join(evidence.budget.left_out)}"
        blocks.append(Notes((f"{rule}. The rule: {evidence.budget.rule}.{caution}",)))
    return Section("prompting", "How prompting was chosen", tuple(blocks))


def advice_section(advice: Advice) -> Section:
    """Return the prompting arms before a training: every arm, static ones by their draws, and the finalists if any."""
    narrowing = advice.narrowing
    arms = advice.arms if narrowing is None else narrowing.arms
    all_dev = f"{advice.items} dev items"
    on = all_dev if narrowing is None else f"{narrowing.items} of the {all_dev}"
    blocks: list[Block] = [
        Lead(f"Prompting on {on}, untuned base"),
        arms_table("Table of prompting arms", advice, [arm for arm in arms if arm.seed is None]),
    ]
    if advice.static:
        blocks += [Lead(f"Static demonstrations on {on}"), _draws(advice.static)]
    if narrowing is not None:
        blocks += [
            Lead(f"Finalists on all {all_dev}"),
            arms_table("Table of finalists", advice, advice.arms),
            Notes((f"Finalists: {narrowing.rule}.",)),
        ]
    trimmed = advice.budget.prompting if advice.budget else ()
    missing = [f"Left out: {arm.name}: {arm.why}." for arm in advice.left_out if arm.name not in trimmed]
    best = f"Best prompting arm: {advice.best}. A fine-tune has to beat it."
    notes = Notes((*missing, *left_out(advice.budget), best))
    return Section("prompting", "Prompting arms", (*blocks, notes))


def _narrowing(evidence: Evidence, found: Narrowing) -> tuple[Block, ...]:
    fates = found.fates | dict.fromkeys(found.finalists, "advanced")
    return (
        Lead(
            f"These were selected from {len(found.arms)} arms, which all answered {found.items:,} dev items "
            f"({found.clusters:,} clusters) first. {found.rule}"
        ),
        arms_table("Table of all prompting arms", evidence, found.arms, fates),
    )


def _draws(spreads: tuple[SeedSpread, ...]) -> Table:
    head = ("Arm", "Draws", "Items", "Mean", "Lowest", "Highest")
    return table("Table of draws", head, (_spread(each) for each in spreads))


def _spread(each: SeedSpread) -> Row:
    scores = (each.mean, min(each.scores), max(each.scores))
    numbers = (f"{100 * score:.1f}" for score in scores)
    return row(each.name, f"{len(each.scores)}", f"{each.items:,}", *numbers)


def folds_section(evidence: Evidence) -> Section | None:
    """Return the folds of a cross-validation: training rows, choices and scores."""
    if evidence.design != "cross-fitted":
        return None
    lead = (
        "Each fold trained its own adapter, and chose its epoch and its prompting arm on its own dev rows. "
        f"Scores are {axis_label(evidence.metric)}."
    )
    arms = [arm.name for arm in evidence.arms]
    best, losses = Column("Best prompting", words=True), Column("Dev loss by epoch", words=True)
    head: tuple[str | Column, ...] = ("Fold", "Trained on", "Chosen by", "Items", best, *arms, losses)
    rows = tuple(_fold(fold, arms) for fold in evidence.folds)
    return Section("folds", "The folds", (Lead(lead), table("Table of folds", head, rows)))


def _fold(fold: Fold, arms: list[str]) -> Row:
    scores = (fold.scores[name] for name in arms)
    return row(
        f"{fold.number}",
        f"{fold.train_items:,}",
        f"{fold.dev_items:,}",
        f"{fold.items:,}",
        fold.best_prompting,
        *("none" if score is None else f"{100 * score:.1f}" for score in scores),
        ", ".join(f"{loss:.3f}" for loss in fold.dev_losses),
    )


def optimization_section(prompt: OptimizedPrompt) -> Section:
    """Return the optimization's summary, its candidates and the chosen instruction."""
    blocks: list[Block] = [Lead(prompt.summary), _candidates(prompt)]
    notes = [f"The chosen instruction ({prompt.digest}): {prompt.instruction}"] if prompt.instruction else []
    notes += [f"Optimization: {note}." for note in prompt.notes]
    if notes:
        blocks.append(Notes(tuple(notes)))
    return Section("optimized-prompt", "The optimized prompt", tuple(blocks))


def _candidates(prompt: OptimizedPrompt) -> Table:
    head = ("Instruction", Column("Made from", words=True), "Validation", "Dev", Column("Result", words=True))
    rows = []
    for place, each in enumerate(prompt.candidates):
        parents = ", ".join(prompt.candidates[parent].digest if parent else "own" for parent in each.parents)
        rows.append(
            row(
                "the pairs' own" if place == 0 else each.digest,
                parents,
                f"{100 * each.validation:.1f}",
                "" if each.dev is None else f"{100 * each.dev:.1f}",
                "chosen" if place == prompt.chosen else "",
            )
        )
    return table("Table of optimized instructions", head, rows)
