"""Bases with 4-bit linear layers: NF4 with double quantization, by bitsandbytes.

Quantized weights are never stored. They are computed from the base's own files at each load, always to the same bits,
so the base's digest identifies them.

peft's ``prepare_model_for_kbit_training`` is not called: it converts embeddings, norms and the output layer to float32
(for Llama 3.1 8B 4.2 GB instead of 2.1). Its other steps (freezing the base, gradient checkpointing) are done by peft
and the trainer.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from tunewright.config import Quantization
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_OLDEST = (0, 50)
"""The first bitsandbytes that trains over NF4 on the CPU as on CUDA; as in pyproject.toml."""


def require_bitsandbytes(quantization: Quantization, key: str = "quantization") -> None:
    """Check that a base can be quantized so, before anything is loaded; ``key`` is the config's key for it.

    Raises:
        UserError: NF4 is requested, and bitsandbytes is missing or too old.
    """
    if quantization == "none":
        return
    try:
        found = package_version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        installed = "it is not" if found is None else f"{found} is"
        raise UserError(
            f"nf4 needs bitsandbytes {needed} or newer, and {installed} installed",
            where=key,
            fix=f"pip install 'tunewright[4bit]', or set {key} to none.",
        )


def nf4_config(dtype: str, *, shardable: bool = False) -> BitsAndBytesConfig:
    """Return NF4 with double quantization, blocks of 64 (Dettmers et al. 2023, section 3), computing in ``dtype``.

    With ``shardable`` the same bytes are stored as numbers of ``dtype``, because FSDP cannot shard integer weights.

    Raises:
        UserError: see `require_bitsandbytes`.
    """
    require_bitsandbytes("nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shardable else "uint8",
    )


def disable_repacking(model: Any) -> None:
    """Make a freshly quantized model compute the same in training and in eval mode.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at its first pass in eval mode: their scales
    are rounded to bfloat16. No gradient passes through the layer until its state is next taken, which unpacks the
    weights to slightly different values. After evaluating dev, a run would continue with wrong or no gradients over
    another base.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [part for part in model.modules() if isinstance(part, Linear4bit)]
    assert layers, "nothing was quantized"
    for layer in layers:
        # Not a constructor argument; tests/models/test_quantized.py fails if the name changes.
        layer.support_avx512bf16_for_cpu = False
