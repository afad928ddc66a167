"""CUDA cards that torch was built for and cannot use."""

from __future__ import annotations

import os


def unusable_card() -> str | None:
    """Return why a torch that is built for CUDA can use no card here.

    None where it uses one, where it is built without CUDA, and where CUDA_VISIBLE_DEVICES hides all cards.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # Torch's sentence on the cause comes first, its advice after it.
        return str(error).split(" Please ")[0].strip().rstrip(".")
    return "torch finds none"
