"""Bases: finding, loading, quantizing, and estimating their memory."""

import logging
import os
import sys

# The Hugging Face libraries report no usage from here, unless the user's environment asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# peft imports bitsandbytes if it is installed. On a CPU with AVX512-BF16 that recommends compiled code from the hub for
# a layer's evaluation mode, which `disable_repacking` turns off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""Each batch has a different number of tokens, so blocks of fixed sizes would fragment GPU memory.

torch 2.13 reads this name before the newer PYTORCH_ALLOC_CONF, which 2.9.1 ignores (pytorch issue 183387).
"""

_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Set before torch is imported. On Windows torch has no such segments and warns about the setting.
if sys.platform != "win32" and not any(name in os.environ for name in _ALLOCATOR_NAMES):
    os.environ.update([ALLOCATOR])
