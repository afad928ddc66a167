"""A model whose memory holds a limited number of rows."""

from __future__ import annotations

from typing import Any

import torch


def run_out_of_memory(model: Any, most_rows: int) -> Any:
    """Have passes of more rows than that fail as a full card does; return the model."""

    def fail(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    return model
