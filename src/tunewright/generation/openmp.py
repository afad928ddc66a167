"""OpenMP threads of a process in which several threads compute."""

from __future__ import annotations

from threadpoolctl import ThreadpoolController

_SOFT = 1  # omp_pause_soft, of omp.h


def release_openmp_threads() -> None:
    """Release the OpenMP workers of the calling thread; its next computation starts them again.

    OpenMP gives each computing thread its own workers, one for each further core, and keeps them. Once there are more
    workers than cores, all of them sleep between any two steps, some hundred times a pass. A model that another thread
    runs then takes twice as long (benchmarks/adapter_passes.py). So call this before handing a model to another thread.
    Without this OpenMP function nothing happens. Source: OpenMP 5.0, 3.2.44; libgomp, config/linux/wait.h.
    """
    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        pause = getattr(library.dynlib, "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)
