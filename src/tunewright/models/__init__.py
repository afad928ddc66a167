"""Finding, loading and running a base."""

import logging
import os
import sys

# A fine-tune is its owner's business: the Hugging Face libraries report no usage from here, unless asked to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Wherever it is installed, peft imports bitsandbytes, and on a CPU with AVX512-BF16 that recommends a package of
# compiled code from the hub for a layer's evaluation mode, which `held_in_nf4` turns off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""Each batch has another number of tokens, so that blocks of fixed sizes would fragment a card's memory.

torch 2.13 reads this name before the newer PYTORCH_ALLOC_CONF, which 2.9.1 ignores (pytorch issue 183387)."""

_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Before torch is imported. On Windows torch has no such segments and warns of the setting.
if sys.platform != "win32" and not any(name in os.environ for name in _ALLOCATOR_NAMES):
    os.environ.update([ALLOCATOR])
