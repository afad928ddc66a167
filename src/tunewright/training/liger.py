"""Liger's fused kernels for a model's rotary embedding, norms and SwiGLU (Hsu et al. 2024, arXiv 2410.10989)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.progress import Reporter

KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    # packing/fused_loss.py computes the loss, on the trained tokens only.
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
"""The used kernels, by the argument names of liger-kernel."""

# Liger 0.8.5 has no kernels for Mistral 3 and Ministral 3. For Mixtral it replaces the experts, and then computes
# gradients of these frozen weights, as large as the experts.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def missing_for_liger(architecture: str) -> str | None:
    """Return the missing requirement of Liger's kernels for a base of this architecture; None if they can run."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if not torch.cuda.is_available():
        return "Liger's kernels need a CUDA GPU, and none is present"
    if architecture not in ARCHITECTURES:
        return f"Liger's kernels support Llama and Mistral, not {architecture}"
    return None


def require_liger(asked: bool | Literal["auto"], architecture: str) -> None:
    """Check that Liger's kernels can run if the config requires them, before anything is loaded."""
    missing = missing_for_liger(architecture) if asked is True else None
    if missing is not None:
        install = f"{install_command('liger')}, or set" if find_spec("liger_kernel") is None else "Set"
        raise UserError(missing, where="train.use_liger_kernel", fix=f"{install} train.use_liger_kernel to auto.")


def choose_liger(asked: bool | Literal["auto"], architecture: str, began_with: bool | None, reporter: Reporter) -> bool:
    """Return whether a run uses Liger's kernels; report it where the config allows them and the machine has a GPU.

    With ``auto``, a run that began without them (``began_with``) resumes without them.
    """
    if asked is False:
        return False
    why = missing_for_liger(architecture)
    if asked == "auto" and began_with is False:
        why = "the run began without them"
    if why is None:
        reporter.say("Liger's kernels: used for the rotary embedding, RMSNorm and SwiGLU.")
    elif began_with:
        reporter.warn(f"The run began with Liger's kernels. It resumes without them, because {why}.")
    elif torch.cuda.is_available():
        reporter.say(f"Liger's kernels: not used, because {why}.")
    return why is None


@contextmanager
def liger_kernels(model: Any) -> Iterator[None]:
    """Replace a loaded Llama's or Mistral's rotary embedding, norms and SwiGLU by Liger's until the block ends.

    trl 1.16 deprecates its argument ``use_liger_kernel``; this uses the transformers function behind it. Liger also
    replaces the rotary embedding of every model of that class, and the classes of later models' norms and MLPs. Both
    are restored, because another model of this process may be on the CPU. This model keeps Liger's norms and SwiGLU.
    """
    from transformers.integrations.liger import apply_liger_kernel

    names = vars(sys.modules[type(model.get_decoder()).__module__])
    before = dict(names)
    try:
        apply_liger_kernel(model, KERNELS)
        yield
    finally:
        names.update(before)
