"""``train`` and ``estimate-memory``: an adapter, a sweep, a learning curve, and whether training fits into memory."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunewright.cli.app import TRAIN, app, command, given_options
from tunewright.cli.console import CANT_TELL, MEASURED_NO, RESUMES, Session
from tunewright.core.errors import UserError
from tunewright.render.blocks import Block, Lead, table
from tunewright.training.options import MemoryOptions, SweepOptions

if TYPE_CHECKING:
    from tunewright.config import MetricName
    from tunewright.models.memory_plan import Plan
    from tunewright.render.terminal import Part
    from tunewright.training.sweep.sweep import SweepResult


@command(
    app,
    "train",
    panel=TRAIN,
    cluster=True,
    loads=True,
    example="tunewright train --sweep --minutes 60 --write",
    kept=RESUMES,
    together=lambda options: not options["sweep"] and not options["curve"],
    options=SweepOptions,
)
def train(
    run: Session,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try both presets with three learning rates, by successive halving on dev.")
    ] = False,
    options: SweepOptions = SweepOptions(),
    curve: Annotated[
        bool, typer.Option("--curve", help="Train on parts of the rows: would more data help? Exit code 0 yes, 3 no.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Number of trainings of each part (--curve only).", show_default="3")
    ] = None,
) -> int | None:
    """Train the config's adapter on the current dataset version. Resumes where it stopped."""
    of_sweep = [name for name in given_options(options) if name != "--force"]
    if of_sweep and not sweep:
        raise UserError(f"{of_sweep[0]} requires --sweep", where=of_sweep[0], fix="Add --sweep.")
    if seeds is not None and not curve:
        raise UserError("--seeds requires --curve", where="--seeds", fix="Add --curve.")
    if sweep and curve:
        raise UserError("--sweep and --curve are mutually exclusive", where="--sweep/--curve", fix="Choose one.")
    if sweep:
        result, written = run.project.sweep(options)
        run.show(sweep_document(result, written), *sweep_tables(result, written))
        return 0 if result.winner is not None else CANT_TELL
    if curve:
        return _curve(run, seeds, force=options.force)
    _train(run, force=options.force)
    return None


def _train(run: Session, *, force: bool) -> None:
    from tunewright.config.metrics import metric_name

    result = run.project.train(force=force)
    adapter = result.adapter
    training = adapter.lineage["training"]
    metric = metric_name(run.project.folder.config.evaluate.metric)
    evaluated = ", ".join(_evaluated(e, metric) for e in training["epochs"])
    run.show(
        {
            "adapter": adapter.name,
            "folder": str(adapter.folder),
            "trained": result.trained,
            "detectable_effects": [each.as_dict() for each in run.project.detectable_effects()],
            **training,
        },
        f"{'Trained' if result.trained else 'Already trained'}: {adapter.folder}\n"
        f"{training['examples']} examples; dev loss by evaluation {evaluated}; kept step {training['kept_step']}",
    )


def _evaluated(evaluation: dict[str, Any], metric: MetricName) -> str:
    """Return the dev loss, and the score with its metric's name."""
    from tunewright.metrics import metric_label, score_text

    loss, score = f"{evaluation['dev_loss']:.3f}", evaluation["dev_metric"]
    if score is None:
        return loss
    value = score_text(metric, score)  # only a share is printed without the metric's name
    return f"{loss} ({f'{metric_label(metric)} {value}' if value.endswith('%') else value})"


def _curve(run: Session, seeds: int | None, *, force: bool) -> int:
    from tunewright.evidence.learning_curve import curve_section, more_data
    from tunewright.report.verbs import CURVE_PLOT, SEEDS

    result = run.project.curve(seeds=SEEDS if seeds is None else seeds, force=force)
    found = more_data(result.curve)
    run.show(
        {
            "folder": str(result.folder),
            "plot": str(result.folder / CURVE_PLOT),
            "measured": result.measured,
            "more_data": found.answer,
            "reasons": list(found.reasons),
            "curve": result.curve.model_dump(mode="json"),
        },
        curve_section(result.curve),
        f"Curve: {result.folder / CURVE_PLOT}",
    )
    return found.exit_code


def sweep_tables(result: SweepResult, written: dict[str, Any]) -> list[Part]:
    """Return each trial at each rung, its outcome, and the winner."""
    from tunewright.core.progress import duration
    from tunewright.report.training import sweep_section

    ledger = result.ledger
    parts: list[Part] = [sweep_section(ledger), f"Ledger: {ledger.path} ({duration(ledger.seconds)} in all)"]
    if result.winner is None or result.adapter is None:
        left_out = any(entry.event == "left out" for entry in ledger.entries)
        what_to_do = "A larger --minutes resumes from here." if left_out else "Try lower rates with --rate."
        return [*parts, f"No winner: no trial finished. {what_to_do}"]
    parts.append(f"Winner: {result.winner.name}, fully trained: {result.adapter.folder}")
    if result.edge_warning:
        parts.append(result.edge_warning)
    if written:
        shown = {key: f"[{', '.join(each)}]" if isinstance(each, tuple) else each for key, each in written.items()}
        values = ", ".join(f"train.{key}: {value}" for key, value in shown.items())
        parts.append(f"Written to tunewright.yaml: {values}")
    parts.append(
        f"Its dev score is the best of {len(ledger.head.trials)}, so it is optimistic. `tunewright evaluate` measures "
        "on test."
    )
    return parts


def sweep_document(result: SweepResult, written: dict[str, Any]) -> dict[str, Any]:
    """Return the sweep as JSON."""
    head, ledger = result.ledger.head, result.ledger
    trials = []
    for name, about in head.trials.items():
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        rungs = [e.model_dump(mode="json", exclude_none=True) for e in results if e is not None]
        trials.append({"name": name, **about, "rungs": rungs, "fate": ledger.outcome(name)})
    return {
        **head.model_dump(mode="json", exclude={"trials"}),
        "ledger": str(ledger.path),
        "seconds": round(ledger.seconds, 1),
        "trials": trials,
        "winner": None if result.winner is None else result.winner.name,
        "adapter": None if result.adapter is None else result.adapter.name,
        "at_the_edge": result.edge_warning,
        "written": {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()},
    }


_TITLES = {"head": "output layer", "working": "working space"}
"""Titles of parts that have other names in the code."""


@command(
    app,
    "estimate-memory",
    panel=TRAIN,
    example="tunewright estimate-memory --gpu 'RTX 4090'",
    status=False,
    options=MemoryOptions,
)
def estimate_memory(
    run: Session,
    options: MemoryOptions = MemoryOptions(),
) -> int:
    """Estimate whether training fits into memory (exit code 0) or not (3), by part, with the largest micro-batches.

    Computed from the base's config.json; no weights are downloaded or loaded. Your longest row is measured if the
    project has a dataset and the base's tokenizer is on this machine.
    """
    from tunewright.models.memory_plan import gigabytes

    result, answer = run.unopened.estimate_memory(options)
    setup = result.setups[0].setup
    run.show(
        {"answer": answer, **result.as_dict()},
        answer.text,
        f"{result.base}: {result.shape.parameters:,} parameters; LoRA of rank {setup.rank} on "
        f"{', '.join(setup.targets)}: {result.shape.adapter_parameters(setup.targets, setup.rank):,}\n"
        f"Memory: {gigabytes(result.memory.bytes)} ({result.memory.source})",
        *_parts_blocks(result),
        *_fits_blocks(result),
        _summary(result),
    )
    return 0 if answer.fits else MEASURED_NO


def _heads(plan: Plan) -> list[str]:
    how = {0: "", "all": ", checkpointed"}
    return [
        p.setup.name + how.get(p.setup.recomputed, f", {p.setup.recomputed} layers checkpointed") for p in plan.setups
    ]


def _parts_blocks(plan: Plan) -> tuple[Block, ...]:
    from tunewright.models.memory_plan import gigabytes

    load, setups = plan.asked, plan.setups
    sharing = f", the first {load.shared:,} shared" if load.shared else ""
    title = f"Memory for {load.rows} x {plan.length:,} tokens{sharing}, {load.trained:,} of each row trained"
    parts = (part.name for part in fields(setups[0].asked))
    rows = [(_TITLES.get(part, part), *(gigabytes(getattr(each.asked, part)) for each in setups)) for part in parts]
    rows.append(("together", *(gigabytes(each.asked.total) for each in setups)))
    rows.append(("fits", *("yes" if each.asked.total <= plan.memory.bytes else "no" for each in setups)))
    return (Lead(title), table(title, ("Part", *_heads(plan)), rows))


def _fits_blocks(plan: Plan) -> tuple[Block, ...]:
    from tunewright.models.memory_plan import MOST_ROWS

    def text(rows: int) -> str:
        return f"{rows:,}+" if rows == MOST_ROWS else f"{rows:,}" if rows else "-"

    title = "Largest micro-batch, in rows, by the tokens of each row"
    lengths = (f"{length:,}" for length in plan.setups[0].largest)
    rows = ((head, *map(text, each.largest.values())) for head, each in zip(_heads(plan), plan.setups, strict=True))
    return (Lead(title), table(title, ("Tokens", *lengths), rows))


def _summary(plan: Plan) -> str:
    lines = []
    for head, planned in zip(_heads(plan), plan.setups, strict=True):
        if not planned.longest:
            lines.append(f"{head}: does not fit, not even one row of one token.")
            continue
        at_length = [(length, rows) for length, rows in planned.largest.items() if rows]
        most = (
            "no listed length fits" if not at_length else f"at most {at_length[-1][1]:,} x {at_length[-1][0]:,} tokens"
        )
        lines.append(f"{head}: {most}; the longest single row is {planned.longest:,} tokens.")
    return "\n".join(lines)
