"""A stand-in for liger-kernel on the fake card, where Triton's kernels cannot run: it has shapes and no numbers."""

__version__ = "0.3.0"
