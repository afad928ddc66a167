"""Finding, loading and running a base."""

import os

# A fine-tune is its owner's business: the Hugging Face libraries report no usage from here, unless asked to.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
