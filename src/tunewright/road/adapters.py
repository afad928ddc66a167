"""The verbs on trained adapters: ``tunewright adapters …``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunewright.adapters.registry import Adapter, find_adapter, list_adapters
from tunewright.adapters.servable import require_batchable
from tunewright.road.opened import OpenProject

if TYPE_CHECKING:
    from tunewright.evaluation.scaling import ScaleResult


class AdaptersRoad:
    """What can be done with a project's trained adapters."""

    def __init__(self, opened: OpenProject) -> None:
        self._opened = opened

    def list(self) -> Sequence[Adapter]:
        """The trained adapters, the newest last."""
        return list_adapters(self._opened.project.adapters)

    def scale(self, adapter: str | None = None, factors: Sequence[float] | None = None) -> ScaleResult:
        """Measure an adapter (the newest by default) at several scales, and store it at the one that is chosen.

        Chosen is, of those that lose less than evaluate.margin on dev against the best, the one that forgets least.

        Raises:
            UserError: no such adapter, or one that does not fit, is no plain LoRA or is itself a scaled one.
        """
        from tunewright.evaluation.forgetting import ForgettingMeter
        from tunewright.evaluation.scaling import FACTORS, scale

        tuned = find_adapter(self._opened.project.adapters, adapter)
        require_batchable(tuned.folder)
        measurement = self._opened.measurement(tuned)
        meter = ForgettingMeter(self._opened.project, measurement.version, measurement.generator)
        return scale(measurement, meter, tuned, factors or FACTORS)
