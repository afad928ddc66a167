"""The verb ``train --curve``: a learning curve and its plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.data.versions import load_version
from tunewright.evaluation.tuning import open_trainings, refuse_up_front
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.evaluation.learning_curve import CurveResult

CURVE_PLOT = "curve.svg"
SEEDS = 3
"""Seeds of a learning curve: fewer cannot separate training noise from the effect of more rows."""


def curve(project: OpenProject, *, seeds: int = SEEDS, force: bool = False) -> CurveResult:
    """Train on parts of the training rows with several seeds, to predict on dev if more rows would help.

    The plot is saved next to the result as curve.svg. ``force`` as in :meth:`train`.
    """
    from tunewright.evaluation.learning_curve import LearningCurve
    from tunewright.render.plots import lines_file
    from tunewright.report.sections.training import curve_lines

    if seeds < 2:
        raise UserError(f"Must be at least 2 (got {seeds}): one seed cannot show the noise", where="--seeds")
    refuse_up_front(project, "A learning curve")
    version, chat = load_version(project.folder.dataset), project.chat
    with open_trainings(project) as trainings:
        result = LearningCurve(
            project.folder, version, project.base, chat, project.reporter, trainings, seeds=seeds, force=force
        ).run()
    write_text(result.folder / CURVE_PLOT, lines_file(curve_lines(result.curve)))
    return result
