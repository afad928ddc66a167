"""Silencing other libraries' progress bars and hints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
