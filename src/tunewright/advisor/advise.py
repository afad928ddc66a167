"""The verb ``advise``."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.tuning import open_trainings, refuse_up_front
from tunewright.evaluation.verbs import open_arm_runner, report_detectable_effects
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.advisor.result import AdviceResult


def advise(
    project: OpenProject, stored: str | Path | None = None, *, pilot: bool = True, minutes: float | None = None
) -> AdviceResult:
    """Advise to prompt, retrieve or fine-tune, or can't tell, from three signals and a pilot on dev.

    Args:
        stored: earlier advice (ID or file) to decide from again, without measuring.
        pilot: train a pilot adapter on a part of the training rows. Without it the gain of training is unknown.
        minutes: time limit for answers; prompting arms that do not fit are left out by name (None: no limit).

    Raises:
        UserError: no such advice, too few minutes, or arms that cannot be measured.
    """
    from tunewright.advisor.signals import find_advice, load_signals

    if stored is not None:
        from tunewright.advisor.result import AdviceResult

        file = find_advice(project.folder.advice, stored)
        if project.folder.advice.absolute() in file.absolute().parents:
            AccessLog(project.folder.evaluations).require(file)
        return AdviceResult(file, load_signals(file), measured=False)
    from tunewright.advisor.adviser import Adviser

    if pilot:
        refuse_up_front(project, "A pilot")
    report_detectable_effects(project)
    with open_trainings(project) if pilot else nullcontext() as pilots:
        return Adviser(partial(open_arm_runner, project), pilots=pilots, minutes=minutes).advise()
