"""Optional Liger kernels (Hsu et al. 2024, arXiv 2410.10989); the models' own code stays the reference."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tunewright.core.errors import UserError

LIGER_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    # packing/fused_loss.py computes the loss, on the trained tokens alone.
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
"""The used kernels, by the argument names of liger-kernel."""


def missing_for_liger() -> str | None:
    """Return the requirement of Liger's kernels that is missing on this machine; None if they can run."""
    import torch

    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if torch.cuda.is_available() else "Liger's kernels need a CUDA GPU, and none is present"


def require_liger(asked: bool) -> None:
    """Check that Liger's kernels can run if the config asks for them, before anything is loaded.

    Raises:
        UserError: liger-kernel is not installed, or there is no GPU.
    """
    missing = missing_for_liger() if asked else None
    if missing is not None:
        install = "pip install 'tunewright[liger]', or set" if find_spec("liger_kernel") is None else "Set"
        raise UserError(missing, where="train.use_liger_kernel", fix=f"{install} train.use_liger_kernel to false.")


def use_liger(model: Any) -> None:
    """Replace a loaded Llama's or Mistral's rotary embedding, norms and SwiGLU by Liger's.

    trl 1.16 deprecates its argument ``use_liger_kernel``; this is the transformers function behind it. The rotary
    embedding is replaced for every model of that class in this process.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER_KERNELS)
