"""An evaluation's arms, contrasts, folds and choice of a prompt as blocks; its sections in order."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.config import MetricName
from tunewright.core.text import capitalised, count_of
from tunewright.evidence.benchmarks import benchmarks_section
from tunewright.evidence.common import ArmScore, Budget, percent_bar
from tunewright.evidence.human_eval import human_eval_section
from tunewright.evidence.prompt_optimization import NOT_RUN, optimization_section
from tunewright.evidence.replacement import incumbents_section
from tunewright.evidence.schema import Advice, Arm, ArmKind, Contrast, Evidence, SeedSpread
from tunewright.evidence.verdict import changed_words, fewest_clusters, verdict
from tunewright.metrics import axis_label, metric_label, points_text
from tunewright.render.blocks import (
    Bar,
    Block,
    Cell,
    Column,
    Figure,
    Lead,
    Notes,
    Row,
    Section,
    Table,
    Tone,
    row,
    table,
    words,
)


def evaluation_sections(evidence: Evidence) -> list[Section]:
    """Return folds, arms, contrasts, incumbents and regression benchmarks, as far as they were measured."""
    found = (
        folds_section(evidence),
        arms_section(evidence),
        contrasts_section(evidence),
        incumbents_section(evidence.incumbents, verdict(evidence).replacements) if evidence.incumbents else None,
        benchmarks_section(evidence.regressions) if evidence.regressions else None,
    )
    return [section for section in found if section is not None]


def metric_order(measured: Evidence | Advice) -> list[MetricName]:
    """Return the metrics, the deciding one first; the files sort them by name."""
    return sorted(measured.metrics, key=lambda name: name != measured.metric)


TONES: dict[ArmKind, Tone] = {
    "tuned": "tuned",
    "tuned-retrieved": "tuned",
    "parent": "tuned",
    "static": "prompting",
    "retrieved": "prompting",
    "mixed": "prompting",
    "zero-shot": "plain",
    "incumbent": "plain",
    "free": "plain",
}


def arms_section(evidence: Evidence) -> Section:
    """Return the arms' scores on the held-out items, with a figure for each metric."""
    items = f"{evidence.items:,} held-out test items"
    if evidence.design == "cross-fitted":
        title, items = "Arms on all rows, cross-fitted", f"{evidence.items:,} items"
        how = (
            f"each answered once: by the one of {len(evidence.folds)} adapters that saw no row of its cluster, and "
            "with the prompt that was chosen without it"
        )
    elif evidence.split == "dev":
        title, items = "Arms on the dev split", f"{evidence.items:,} dev items"
        how = (
            "which chose the adapter's step and the best prompting arm: both look better here than they are. The test "
            "split stays closed"
        )
    else:
        title, how = "Arms on the test split", "kept apart from training and from the choice of a prompt"
    blocks: list[Block] = [Lead(f"{items} in {evidence.clusters:,} clusters{evidence.inputs_text}, {how}.")]
    blocks += [
        arms_figure(f"arms-{place}", f"Arms on the {evidence.items_text}s by {axis_label(name)}", evidence.arms, name)
        for place, name in enumerate(metric_order(evidence))
    ]
    blocks.append(arms_table("Table of arms", evidence, evidence.arms))
    whose = evidence.authors_split
    notes = [_ARMS, *([whose.whose(evidence.split)] if whose else [])]
    notes += [*left_out(evidence.budget), *([_FREE] if evidence.free else [])]
    if evidence.engine is not None:
        arms = "All other arms" if evidence.free else "All arms"
        notes.append(f"{arms} were answered by {evidence.engine.text}: {evidence.engine.why}.")
    return Section("arms", title, (*blocks, Notes(tuple(notes))))


_FREE = (
    "Free arms need no language model. They are fitted on the training rows only and scored by the same metrics; no "
    "judge is asked about them, and no p-value is adjusted for them."
)


_ARMS = (
    "zero-shot has no examples in the prompt. static-N-seed-S has the same N training rows in every prompt, by random "
    "draw S. retrieved-N has the N training rows most similar to the input."
)


def left_out(budget: Budget | None) -> list[str]:
    """Return the arms that a time budget left out, with the caution about the baseline."""
    if budget is None:
        return []
    text = f"Left out by --minutes {budget.minutes:g}: {', '.join(budget.left_out)}."
    return [text, *([f"Caution: {budget.caution}"] if budget.caution else [])]


def arms_figure(name: str, title: str, arms: Sequence[Arm], metric: MetricName) -> Figure:
    """Return the arms' scores by one metric, one arm per row."""
    scores = [(arm, arm.score(metric)) for arm in arms]
    bars = (percent_bar(a.name, s.value, s.interval, f"{100 * s.value:.1f}", TONES[a.kind]) for a, s in scores)
    return Figure(name, f"{title}, with 95% intervals", tuple(bars), axis_label(metric), limits=(0, 100))


def arms_table(
    label: str, measured: Evidence | Advice, arms: Sequence[Arm], notes: dict[str, str] | None = None
) -> Table:
    """Return a table of the arms by every metric; ``notes`` has remarks by arm name.

    ``Shared`` counts the tokens that all prompts of the arm begin with. Answers outside the choices, and items that
    could not be scored, have a column if there are any.
    """
    deciding, *others = metric_order(measured)
    counted = measured.metrics[deciding].kind == "right or wrong"
    outside = any(arm.score(deciding).outside for arm in arms)
    unscored = any(arm.score(deciding).unscored for arm in arms)

    def arm_row(arm: Arm) -> Row:
        score = arm.score(deciding)
        return row(
            Cell(arm.name, (notes or {}).get(arm.name, "")),
            *([f"{round(score.value * score.scored)} of {score.scored}"] if counted else []),
            *_scored(score),
            *(text for name in others for text in _scored(arm.score(name))),
            *([f"{score.outside:,}"] if outside else []),
            *([f"{sum(score.unscored.values()):,}"] if unscored else []),
            f"{arm.truncated:,}",
            *(("no model", "") if arm.kind == "free" else (f"{arm.prompt_tokens:.0f}", f"{arm.shared_tokens:,}")),
        )

    head = [
        *words("Arm"),
        *(["Right"] if counted else []),
        *_score_columns(deciding),
        *(column for name in others for column in _score_columns(name, detail=True)),
        *(["Outside choices"] if outside else []),
        *(["Unscored"] if unscored else []),
        Column("Cut by the token limit", detail=True),
        "Prompt tokens",
        "Shared",
    ]
    return table(label, head, map(arm_row, arms))


def _score_columns(metric: MetricName, *, detail: bool = False) -> tuple[Column, Column]:
    return Column(capitalised(axis_label(metric))), Column("95% interval", detail=detail)


def _scored(score: ArmScore) -> tuple[str, str]:
    return f"{100 * score.value:.1f}", score.interval.percents


def contrasts_section(evidence: Evidence) -> Section:
    """Return every contrast, the deciding one first, with raw and adjusted p-values."""
    place = "all items" if evidence.design == "cross-fitted" else f"the {evidence.split} split"
    blocks: list[Block] = [
        Lead(
            f"Contrasts on {place}, in points. To ship, the whole interval of the first one has to lie above the "
            f"margin of {100 * evidence.margin:g}. Detectable is the smallest difference that this many items can show."
        ),
        Figure(
            "contrasts",
            "Differences between arms in points, with 95% intervals, against the margin",
            tuple(map(_difference_bar, evidence.deciding)),
            "difference, points",
            margin=100 * evidence.margin,
            caption="Each line is a 95% interval of tuned minus the arm that it names, or of the two that it names.",
        ),
        _contrasts_table(evidence),
    ]
    if evidence.noise_floor is not None:
        noise = evidence.noise_floor
        text = (
            f"Noise floor: {noise.changed:,} of {noise.items:,} answers changed when the base answered again "
            f"({noise.how}), and its score by {points_text(noise.score_difference)} points."
        )
        blocks.append(Notes((text,)))
    return Section("contrasts", "The difference and the margin", tuple(blocks))


def _difference_bar(contrast: Contrast) -> Bar:
    name = contrast.control if contrast.treatment == "tuned" else f"{contrast.treatment}\n− {contrast.control}"
    return percent_bar(name, contrast.difference, contrast.interval, points_text(contrast.difference))


def _contrasts_table(evidence: Evidence) -> Table:
    several = len(evidence.metrics) > 1
    better, worse = map(capitalised, changed_words(evidence, evidence.metric))
    names = ("Contrast", *(words("Metric") if several else ()), "Difference", "95% interval", "p", "Adjusted p")

    def contrast_row(contrast: Contrast) -> Row:
        decides = contrast is evidence.contrasts[0]
        return row(
            Cell(f"{contrast.treatment} − {contrast.control}", "decides" if decides else ""),
            *([metric_label(contrast.metric)] if several else []),
            points_text(contrast.difference),
            Cell(contrast.interval.points, f"{contrast.scored:,} items"),
            Cell(_p(contrast.p_value), contrast.test),
            "none" if contrast.p_adjusted is None else _p(contrast.p_adjusted),
            f"{contrast.fixed:,}",
            f"{contrast.broken:,}",
            Cell(f"{100 * contrast.minimum_detectable_effect:.1f}", _worth(contrast)),
            decides=decides,
        )

    return table("Table of contrasts", (*names, better, worse, "Detectable"), map(contrast_row, evidence.contrasts))


def _p(p_value: float) -> str:
    """Return a p-value below a heading that names it: ``0.031``, ``5.5e-05``, ``<1e-15``."""
    return "<1e-15" if p_value < 1e-15 else f"{p_value:.2g}"


def _worth(contrast: Contrast) -> str:
    """Return the effective number of independent items, which few clusters cannot show."""
    if contrast.effective_items is None:
        return ""
    if contrast.clusters < fewest_clusters(1):
        few = count_of(contrast.clusters, "cluster")
        return f"{few}: too few to estimate how many independent items these are worth"
    return f"worth {contrast.effective_items:.0f} independent items"


def prompting_section(evidence: Evidence) -> Section | None:
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
    blocks += _free_blocks(evidence, "the dev split")
    if evidence.narrowing is not None:
        found = evidence.narrowing
        fates = found.fates | dict.fromkeys(found.finalists, "advanced")
        blocks += [
            Lead(
                f"These were selected from {len(found.arms)} arms, which all answered {found.items:,} dev items "
                f"({found.clusters:,} clusters) first. {found.rule}"
            ),
            arms_table("Table of all prompting arms", evidence, found.arms, fates),
        ]
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
        *_free_blocks(advice, all_dev),
        Lead(f"Prompting on {on}, untuned base\n{_ARMS}"),
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


def _free_blocks(measured: Evidence | Advice, items: str) -> list[Block]:
    if (free := measured.free) is None:
        return []
    lead = Lead(f"Free arms, which need no language model, on {items}: {free.why}")
    notes = (f"Best free arm: {free.best}.", *(f"Left out: {each.name}: {each.why}." for each in free.left_out))
    return [lead, arms_table("Table of free arms", measured, free.dev), Notes(notes)]


def _draws(spreads: tuple[SeedSpread, ...]) -> Table:
    head = ("Arm", "Draws", "Items", "Mean", "Lowest", "Highest")
    rows = []
    for each in spreads:
        scores = (each.mean, min(each.scores), max(each.scores))
        rows.append((each.name, f"{len(each.scores)}", f"{each.items:,}", *(f"{100 * score:.1f}" for score in scores)))
    return table("Table of draws", head, rows)


def folds_section(evidence: Evidence) -> Section | None:
    """Return the folds of a cross-validation: training rows, choices and scores."""
    if evidence.design != "cross-fitted":
        return None
    lead = (
        "Each fold trained its own adapter, and chose its epoch and its prompting arm on its own dev rows. "
        f"Scores are {axis_label(evidence.metric)}."
    )
    arms = [arm.name for arm in evidence.arms]
    counts = ("Fold", "Trained on", "Chosen by", "Items")
    rows = []
    for fold in evidence.folds:
        items = (f"{count:,}" for count in (fold.train_items, fold.dev_items, fold.items))
        scores = ("none" if (score := fold.scores[name]) is None else f"{100 * score:.1f}" for name in arms)
        losses = ", ".join(f"{loss:.3f}" for loss in fold.dev_losses)
        rows.append((f"{fold.number}", *items, fold.best_prompting, *scores, losses))
    head = (*counts, *words("Best prompting"), *arms, *words("Dev loss by epoch"))
    return Section("folds", "The folds", (Lead(lead), table("Table of folds", head, rows)))


_DECIDES_NOTHING = (
    "A comparison apart from the one with prompting. It affects neither the verdict nor the outcome above."
)


def human_eval_sections(evidence: Evidence) -> list[Section]:
    """Return people's results on the deciding arms, then their results against each incumbent."""
    found = [human_eval_section(evidence.human_eval)] if evidence.human_eval else []
    for number, (name, review) in enumerate(evidence.human_eval_incumbents.items(), start=1):
        blocks = (Lead(_DECIDES_NOTHING), *human_eval_section(review).blocks)
        title = f"What people say against the model in use, {name}"
        found.append(Section(f"human-eval-incumbent-{number}", title, blocks))
    return found
