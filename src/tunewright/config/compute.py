"""The config's compute section: the machines that work on many rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from tunewright.config.section import Section
from tunewright.core.errors import UserError


class ComputeConfig(Section):
    """Machines that compute. They decide how long a step takes, and are no input of its result."""

    cluster: Annotated[
        str | None,
        Field(
            pattern=r"^(local|auto|ray://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5})$",
            description="Ray cluster that works on rows, trains and answers prompts: local (started on this machine "
            "for one command), auto (RAY_ADDRESS, or the cluster that runs on this machine) or ray://HOST:PORT; null: "
            "this process. It needs tunewright[ray].",
        ),
    ] = None
    workers: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes of the cluster that compute at once (null: as many as its CPUs or GPUs allow; to "
            "train, one for each GPU, and without GPUs this process).",
        ),
    ] = None
    fsdp: Annotated[
        bool,
        Field(description="Shard the base over the processes that train (FSDP2), if it does not fit on one GPU."),
    ] = False


def with_cluster(compute: ComputeConfig, cluster: str) -> ComputeConfig:
    """Return the section with the cluster that ``--cluster`` names.

    Raises:
        UserError: it is none of the three forms.
    """
    try:
        return ComputeConfig(**{**compute.model_dump(), "cluster": cluster})
    except ValidationError:
        fix = "Use local, auto or ray://HOST:PORT."
        raise UserError(f"Not a cluster: {cluster!r}", where="--cluster", fix=fix) from None
