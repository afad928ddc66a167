"""Which thread's passes have the processor's cores."""

from __future__ import annotations

from threadpoolctl import ThreadpoolController

_SOFT = 1  # omp_pause_soft, of omp.h


def release_cores() -> None:
    """Let the helpers go that this thread computes with; they come again with its next computation.

    OpenMP gives each thread that computes helpers of its own, one for each further core, and keeps them. Once there are
    more of them than cores it has all of them sleep between any two steps, some hundred times a pass: then a model that
    another thread runs takes twice as long (benchmarks/adapter_passes.py). So who hands a model over calls this.
    Nothing happens where there is no such function. Source: OpenMP 5.0, 3.2.44; libgomp, config/linux/wait.h.
    """
    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        pause = getattr(library.dynlib, "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)
