"""Which adapters a server holds, and how it holds the base under them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tunewright.adapters.fit import require_fit, trained_quantize
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters
from tunewright.adapters.servable import require_batchable
from tunewright.errors import UserError
from tunewright.recipe import Quantize
from tunewright.road.opened import OpenProject


def choose_served(opened: OpenProject, names: Sequence[str]) -> tuple[Quantize, dict[str, Path]]:
    """How the base is held, and the folders of the adapters so named (all that fit, where none is), by name.

    Raises:
        UserError: a named adapter that does not fit, or that cannot be served together with the others.
    """
    recipe = opened.project.recipe
    if not names:
        held = recipe.serve.quantize or recipe.train.quantize
        return held, {adapter.name: adapter.folder for adapter in _all_that_fit(opened, held)}
    folders: dict[str, Path] = {}
    named: list[Adapter] = []
    for name in names:
        adapter_name, _, step = name.partition("@")
        adapter = find_adapter(opened.project.adapters, adapter_name)
        _require_servable(opened, adapter)
        named.append(adapter)
        if step:
            folders[f"{adapter.name}@{step}"] = adapter.checkpoint(step)
        else:
            folders[adapter.name] = adapter.folder
    return recipe.serve.quantize or trained_quantize(named), folders


def _all_that_fit(opened: OpenProject, held: Quantize) -> Iterator[Adapter]:
    """The adapters that can be served on the base held so; the others are named in warnings."""
    for adapter in list_adapters(opened.project.adapters):
        try:
            _require_servable(opened, adapter)
            trained = trained_quantize([adapter])
            if opened.project.recipe.serve.quantize is None and trained != held:
                raise UserError(
                    f"it was trained with train.quantize {trained}, and the base is held with {held}; name it to "
                    "serve it, or set serve.quantize"
                )
        except UserError as error:
            opened.reporter.warn(f"{adapter.name} is not served: {error.what}")
            continue
        yield adapter


def _require_servable(opened: OpenProject, adapter: Adapter) -> None:
    require_fit(adapter, opened.base, opened.chat)
    require_batchable(adapter.folder)
