"""Hostile adapters, each built by hand, with the expected reason of its refusal."""

from hostile import archives, configuration, files, header, weights
from hostile.corpus import CORPUS

__all__ = ["CORPUS", "archives", "configuration", "files", "header", "weights"]
