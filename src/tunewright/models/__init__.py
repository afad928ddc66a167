"""Bases: finding, loading, quantizing, and estimating their memory."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The Hugging Face libraries report no usage from here, unless the user's environment asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# peft imports bitsandbytes if it is installed. On a CPU with AVX512-BF16 that recommends compiled
# code from the hub for a layer's evaluation mode, which `disable_repacking` turns off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""Each batch has a different number of tokens, so blocks of fixed sizes would fragment GPU memory.

torch 2.13 reads this name before the newer PYTORCH_ALLOC_CONF, which 2.9.1 ignores (pytorch issue 183387).
"""

_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Set before torch is imported. On Windows torch has no such segments and warns about the setting.
if sys.platform != "win32" and not any(name in os.environ for name in _ALLOCATOR_NAMES):
    os.environ.update([ALLOCATOR])


# At each import it reports that the package kernels, which nothing here uses, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and hints while this is open; its errors are still raised."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    accelerate_log = logging.getLogger("accelerate")
    accelerate_level = accelerate_log.level
    accelerate_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft|torch|transformers|trl")
            yield
    finally:
        hf_logging.set_verbosity(level)
        accelerate_log.setLevel(accelerate_level)
        if bars:
            hf_logging.enable_progress_bar()
