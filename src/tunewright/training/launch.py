"""torchrun, with its arguments, but with the exit code of its processes: torchrun itself always fails with 1.

    python -m tunewright.training.launch --standalone --nproc-per-node=2 -m tunewright train

A scheduler then repeats a lost process (1), and not bad input (2).
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch() -> int:
    """Start processes, and return the exit code of the first one that failed: 1 if a signal ended it."""
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return max(failure.exitcode, 1)
    return 0


if __name__ == "__main__":
    sys.exit(launch())
