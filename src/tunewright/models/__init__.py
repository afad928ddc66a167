"""Finding, loading and running a base."""

import logging
import os

# A fine-tune is its owner's business: the Hugging Face libraries report no usage from here, unless asked to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Wherever it is installed, peft imports bitsandbytes, and on a CPU with AVX512-BF16 that recommends a package of
# compiled code from the hub for a layer's evaluation mode, which `held_in_nf4` turns off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
