"""A step that workers can import: it needs only what Ray's environment has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.core.progress import Task


def joined(shared: npt.NDArray[Any], part: npt.NDArray[Any], task: Task) -> npt.NDArray[Any]:
    """Both arrays as one."""
    task.advance()
    return np.concatenate([shared, part])
