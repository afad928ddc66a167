"""Liger's fused kernels as an option (Hsu et al. 2024, arXiv 2410.10989); the models' own code stays the reference."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tunewright.core.errors import UserError

LIGER_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    # The loss is ours: exact, tile by tile, and on the trained tokens alone.
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
"""Which of them are used, by the names of liger-kernel's arguments."""


def missing_for_liger() -> str | None:
    """Return what Liger's kernels lack here, in words; None where they can run."""
    import torch

    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if torch.cuda.is_available() else "Liger's kernels run on a CUDA card, and there is none"


def require_liger(asked: bool) -> None:
    """Check that Liger's kernels can be used where the config asks for them, before anything is loaded.

    Raises:
        UserError: liger-kernel is not installed, or there is no card.
    """
    missing = missing_for_liger() if asked else None
    if missing is not None:
        install = "pip install 'tunewright[liger]', or set" if find_spec("liger_kernel") is None else "Set"
        raise UserError(missing, where="train.use_liger_kernel", fix=f"{install} train.use_liger_kernel to false.")


def use_liger(model: Any) -> None:
    """Replace a loaded Llama's or Mistral's rotary embedding, norms and SwiGLU by Liger's.

    trl 1.16 deprecates its own argument ``use_liger_kernel``; this is the function of transformers behind it. The
    rotary embedding is replaced for every model of that kind in this process.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER_KERNELS)
