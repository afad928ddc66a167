"""tunewright in one of torchrun's processes, all of them on the first card: `torchrun one_card.py ARGUMENTS`.

NCCL refuses two processes on one card, so they exchange tensors through gloo, over the processor's memory.
"""

from __future__ import annotations

import os
import runpy

import torch

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    # accelerate keeps a process group that exists.
    torch.distributed.init_process_group("gloo")
    runpy.run_module("tunewright", run_name="__main__")
