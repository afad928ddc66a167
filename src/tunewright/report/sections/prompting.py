"""Section on the choice of the prompting arm: on the dev split, or by each fold of a cross-validation."""

from __future__ import annotations

from tunewright.evidence.schema import Evidence, Fold, Narrowing, SeedSpread
from tunewright.metrics import axis_label
from tunewright.report.blocks import Block, Lead, Notes, Row, Section, Table, cells
from tunewright.report.sections import prompt_optimization
from tunewright.report.sections.arms import arms_figure, arms_table


def section(evidence: Evidence) -> Section | None:
    """Return the prompting arms, or the folds; None if the evidence has neither."""
    if evidence.design == "cross-fitted":
        return _folds(evidence)
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
    blocks += prompt_optimization.blocks(evidence)
    if evidence.left_out:
        blocks.append(Notes(tuple(f"Left out: {each.name}, as {each.why}." for each in evidence.left_out)))
    if evidence.budget is not None:
        caution = f" {evidence.budget.caution}" if evidence.budget.caution else ""
        rule = f"--minutes {evidence.budget.minutes:g} left out {', '.join(evidence.budget.left_out)}"
        blocks.append(Notes((f"{rule}. The rule: {evidence.budget.rule}.{caution}",)))
    return Section("prompting", "How prompting was chosen", tuple(blocks))


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
    return Table("Table of draws", head, tuple(_spread(each) for each in spreads))


def _spread(each: SeedSpread) -> Row:
    scores = (each.mean, min(each.scores), max(each.scores))
    numbers = (f"{100 * score:.1f}" for score in scores)
    return Row(cells(each.name, f"{len(each.scores)}", f"{each.items:,}", *numbers))


def _folds(evidence: Evidence) -> Section:
    lead = (
        "Each fold trained its own adapter, and chose its epoch and its prompting arm on its own dev rows. "
        f"Scores are {axis_label(evidence.metric)}."
    )
    arms = [arm.name for arm in evidence.arms]
    head = ("Fold", "Trained on", "Chosen by", "Items", "Best prompting", *arms, "Dev loss by epoch")
    rows = tuple(_fold(fold, arms) for fold in evidence.folds)
    return Section("folds", "The folds", (Lead(lead), Table("Table of folds", head, rows)))


def _fold(fold: Fold, arms: list[str]) -> Row:
    scores = (fold.scores[name] for name in arms)
    return Row(
        cells(
            f"{fold.number}",
            f"{fold.train_items:,}",
            f"{fold.dev_items:,}",
            f"{fold.items:,}",
            fold.best_prompting,
            *("none" if score is None else f"{100 * score:.1f}" for score in scores),
            ", ".join(f"{loss:.3f}" for loss in fold.dev_losses),
        )
    )
