"""A base whose linear layers are held in 4 bits: NF4 with double quantization, by bitsandbytes.

Nothing of it is ever stored: the weights are quantized anew from the base's own files each time they are loaded, always
to the same bits, so that the base's digest says it all.

peft's ``prepare_model_for_kbit_training`` is not called: it turns embeddings, norms and the output layer into float32
(for Llama 3.1 8B 4.2 GB in place of 2.1), and what else it does (freezing the base, gradient checkpointing) peft and
the trainer do by themselves.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from tunewright.config import Quantize
from tunewright.core.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_OLDEST = (0, 50)
"""The first bitsandbytes that trains over NF4 on the CPU as on CUDA; as in pyproject.toml."""


def require_bitsandbytes(quantize: Quantize, key: str = "quantization") -> None:
    """Check that a base can be held so, before anything is loaded; ``key`` is where the config asks for it.

    Raises:
        UserError: NF4 is asked for, and bitsandbytes is missing or too old.
    """
    if quantize == "none":
        return
    try:
        found = package_version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        there = "it is not" if found is None else f"{found} is"
        raise UserError(
            f"nf4 needs bitsandbytes {needed} or newer, and {there} installed",
            where=key,
            fix=f"pip install 'tunewright[4bit]', or set {key} to none.",
        )


def nf4_config(dtype: str, *, divisible: bool = False) -> BitsAndBytesConfig:
    """NF4 with double quantization, blocks of 64 (Dettmers et al. 2023, section 3), computing in ``dtype``.

    With ``divisible`` the same bytes are stored as numbers of ``dtype``: FSDP divides no weights of whole numbers.

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
        bnb_4bit_quant_storage=dtype if divisible else "uint8",
    )


def held_in_nf4(model: Any) -> None:
    """Have a model that transformers has just quantized compute the same in training and in evaluation mode.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at its first pass in evaluation mode: their
    scales are rounded to bfloat16, and no gradient goes through the layer until its state is next taken, which unpacks
    the weights to not quite what they were. After a look at the dev split a run would go on with wrong gradients, or
    none, over another base.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [part for part in model.modules() if isinstance(part, Linear4bit)]
    assert layers, "nothing was quantized"
    for layer in layers:
        # Not in its constructor's arguments; tests/models/test_quantized.py fails if the name changes.
        layer.support_avx512bf16_for_cpu = False
