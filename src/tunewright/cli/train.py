"""What prompting reaches, and the training that has to beat it: advise, train."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session

Force = Annotated[bool, typer.Option("--force", help="Train on fewer than 50 pairs, which is refused otherwise.")]


@app.command()
def advise(project: Folder = HERE, json: Json = False) -> None:
    """Measure prompting on the dev split: zero-shot and retrieved demonstrations, with the untuned base."""
    import tunewright
    from tunewright.cli.tables import arms_table

    with session(json, project) as current:
        result = tunewright.open(project, current.reporter).advise()
        advice = result.advice
        current.show(
            {"file": str(result.file), "measured": result.measured, **advice.model_dump(mode="json")},
            arms_table(f"Prompting on {advice.items} dev items, untuned base", advice.arms),
            f"Best prompting arm: {advice.best}. A fine-tune has to beat it.",
        )


@app.command()
def train(force: Force = False, project: Folder = HERE, json: Json = False) -> None:
    """Train the recipe's adapter on the current dataset version. Goes on where it was stopped."""
    import tunewright

    with session(json, project) as current:
        result = tunewright.open(project, current.reporter).train(force=force)
        adapter = result.adapter
        told = adapter.lineage["training"]
        epochs = ", ".join(f"{e['dev_loss']:.3f}" for e in told["epochs"])
        current.show(
            {"adapter": adapter.name, "folder": str(adapter.folder), "trained": result.trained, **told},
            f"{'Trained' if result.trained else 'Already trained'}: {adapter.folder}\n"
            f"{told['examples']} examples, dev loss by epoch {epochs}, kept step {told['kept_step']}",
        )
