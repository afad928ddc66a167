"""Hostile adapters, each built by hand, with the expected reason of its refusal."""

from hostile import configuration, files, header, weights
from hostile.corpus import CORPUS

__all__ = ["CORPUS", "configuration", "files", "header", "weights"]
