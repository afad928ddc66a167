"""What training needs of memory, of a project or of a base alone."""

from __future__ import annotations

from tunewright.errors import UserError
from tunewright.models.bases import base_config, check_architecture
from tunewright.models.families import require_targets
from tunewright.models.fit.plan import Plan, memory_at_hand, plan
from tunewright.models.fit.shape import read_shape
from tunewright.recipe import Recipe
from tunewright.road.opened import OpenProject


def fitting_plan(
    opened: OpenProject,
    *,
    gpu: str | None,
    base: str | None,
    rows: int | None,
    length: int | None,
    shared: int,
    answer: int | None,
) -> Plan:
    """The plan of `Road.fit`, which says what the arguments are."""
    project, reporter = opened.project, opened.reporter
    memory = memory_at_hand(gpu)
    alone = base is not None and not project.has_recipe
    recipe = Recipe() if alone else project.recipe
    if alone:
        reporter.say("There is no project here: the recipe's defaults hold.")
    spec, revision = (recipe.base, recipe.revision) if base is None else (base, None)
    settings = recipe.train
    if settings.dora:
        reporter.warn("DoRA takes more than is told here: what it needs beyond LoRA is not counted.")
    rows = rows or settings.micro_batch or settings.batch_size
    length = length or settings.max_length
    if shared + (answer or 1) > length:
        raise UserError(
            f"{shared:,} shared and {answer or 1:,} trained tokens are more than a row's {length:,}",
            where="--length",
            fix="Raise it, or lower --shared or --answer.",
        )
    config = base_config(spec, revision, project.root, reporter)
    shape = read_shape(config)
    require_targets(settings.targets, check_architecture(config))
    return plan(spec, shape, settings, memory, rows=rows, length=length, shared=shared, answer=answer or length)
