"""The work of the next training, as far as it is known before it starts."""

from __future__ import annotations

from tunewright.adapters.registry import list_adapters
from tunewright.advisor.costs import training_cost
from tunewright.core.errors import UserError
from tunewright.core.progress import duration
from tunewright.core.text import count_of
from tunewright.data.versions import load_version
from tunewright.open_project import OpenProject
from tunewright.render.blocks import Table, table, words
from tunewright.training.memory import estimate_memory
from tunewright.training.rows import total_steps

_MEASURED_AT_ONCE = 5_000
"""Rows whose tokens are counted for the memory in about a second."""


def training_plan(project: OpenProject) -> Table:
    """Return rows, steps, settings, time, memory and cost of the next training.

    Nothing is loaded but the base's tokenizer. The time is that of earlier trainings of the same base.
    """
    config, settings = project.folder.config, project.folder.config.train
    version = load_version(project.folder.dataset)
    count = len(version.examples("train"))
    steps = total_steps(settings, count)
    seconds = _seconds_per_row(project)
    expected = None if seconds is None else seconds * count * settings.epochs
    rows = [
        ("Rows", f"{count_of(count, 'train row')} of version {version.digest[:12]}"),
        ("Steps", f"{steps:,}: {count_of(settings.epochs, 'epoch')} with {settings.batch_size} rows a step"),
        (
            "Settings",
            f"{config.base_model}, preset {settings.preset}, learning rate {settings.learning_rate:g}, "
            f"rank {settings.lora_r}",
        ),
        (
            "Time",
            "unknown until the first steps, whose log shows the time left"
            if expected is None
            else f"about {duration(expected)}, by an earlier training on this base",
        ),
        ("Memory", _memory(project, len(version.members))),
    ]
    prices = config.advise.prices
    if prices is not None and (prices.training is not None or (prices.hour is not None and expected is not None)):
        rows.append(("Cost", f"{training_cost(prices, expected or 0):,.2f}, by advise.prices"))
    return table("Plan of the training", words("Plan", "Next training"), rows)


def _seconds_per_row(project: OpenProject) -> float | None:
    """Return the seconds that a row took in an epoch of the newest training of this base, pilots included."""
    folder = project.folder
    found = [
        adapter
        for adapter in (*list_adapters(folder.pilot_adapters), *list_adapters(folder.adapters))
        if adapter.lineage.get("config", {}).get("base_model") == folder.config.base_model
    ]
    for adapter in reversed(found):
        done, epochs = adapter.lineage.get("training", {}), adapter.lineage["config"]["train"]["epochs"]
        if done.get("rows") and done.get("seconds"):
            return float(done["seconds"] / (done["rows"] * epochs))
    return None


def _memory(project: OpenProject, rows: int) -> str:
    if rows > _MEASURED_AT_ONCE:
        return "`tunewright estimate-memory` measures it"
    try:
        return estimate_memory(project)[1].text
    except UserError as error:
        return str(error)
