"""Training: train, with its sweep and its curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import CANT_TELL, RESUMES, Session, session
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from tunewright.api import Project
    from tunewright.config import MetricName


Force = Annotated[bool, typer.Option("--force", help="Train on fewer than 50 pairs, which is refused otherwise.")]


@app.command()
def train(
    force: Force = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try both presets with three learning rates, by successive halving on dev.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="--sweep: time for the whole of it.", show_default="as long as it takes")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="--sweep: a learning rate to try; again for more.", show_default="what suits the base"),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="--sweep: put the winner's values into tunewright.yaml.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Train on parts of the rows: would more data help? Exit 0 yes, 3 no.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="--curve: how many trainings of each part.", show_default="3")
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Train the config's adapter on the current dataset version. Goes on where it was stopped."""
    import tunewright

    with session(json, project, together=not sweep and not curve, kept=RESUMES) as current:
        _require_use({"--minutes": minutes, "--rate": rate, "--write": write or None}, "--sweep", given=sweep)
        _require_use({"--seeds": seeds}, "--curve", given=curve)
        if sweep and curve:
            raise UserError("a sweep and a curve are two commands", where="--sweep/--curve")
        opened = tunewright.open(project, current.reporter)
        if sweep:
            _sweep(opened, current, minutes, rate, write=write, force=force)
        elif curve:
            _curve(opened, current, seeds, force=force)
        else:
            _train(opened, current, force=force)


def _require_use(options: dict[str, object], wanted_by: str, *, given: bool) -> None:
    unused = [name for name, value in options.items() if value is not None]
    if unused and not given:
        raise UserError(f"it means something with {wanted_by} only", where=unused[0], fix=f"Add {wanted_by}.")


def _train(opened: Project, current: Session, *, force: bool) -> None:
    from tunewright.config.metrics import metric_name

    result = opened.train(force=force)
    adapter = result.adapter
    told = adapter.lineage["training"]
    metric = metric_name(opened.folder.config.evaluate.metric)
    evaluated = ", ".join(_evaluated(e, metric) for e in told["epochs"])
    current.show(
        {
            "adapter": adapter.name,
            "folder": str(adapter.folder),
            "trained": result.trained,
            "prospects": [each.as_dict() for each in opened.prospects()],
            **told,
        },
        f"{'Trained' if result.trained else 'Already trained'}: {adapter.folder}\n"
        f"{told['examples']} examples; dev loss by evaluation {evaluated}; kept step {told['kept_step']}",
    )


def _evaluated(evaluation: dict[str, Any], metric: MetricName) -> str:
    """Return the dev loss, and the score with its metric's name."""
    from tunewright.metrics.text import metric_label, score_text

    loss, score = f"{evaluation['dev_loss']:.3f}", evaluation["dev_metric"]
    if score is None:
        return loss
    value = score_text(metric, score)  # only a share comes without the name
    return f"{loss} ({f'{metric_label(metric)} {value}' if value.endswith('%') else value})"


def _sweep(
    opened: Project, current: Session, minutes: float | None, rates: list[float] | None, *, write: bool, force: bool
) -> None:
    from tunewright.cli.training_tables import sweep_document, sweep_tables

    result, written = opened.sweep(minutes=minutes, rates=rates, write=write, force=force)
    current.show(sweep_document(result, written), *sweep_tables(result, written))
    raise typer.Exit(0 if result.winner is not None else CANT_TELL)


def _curve(opened: Project, current: Session, seeds: int | None, *, force: bool) -> None:
    from tunewright.api import CURVE_PLOT, SEEDS
    from tunewright.cli.training_tables import curve_tables
    from tunewright.evidence.learning_curve import more_data

    result = opened.curve(seeds=SEEDS if seeds is None else seeds, force=force)
    told = more_data(result.curve)
    current.show(
        {
            "folder": str(result.folder),
            "plot": str(result.folder / CURVE_PLOT),
            "measured": result.measured,
            "more_data": told.answer,
            "reasons": list(told.reasons),
            "curve": result.curve.model_dump(mode="json"),
        },
        *curve_tables(result.curve),
        f"Curve: {result.folder / CURVE_PLOT}",
    )
    raise typer.Exit(told.exit_code)
