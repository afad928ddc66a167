"""Hostile adapters, each built by hand, and the reason for which it has to be refused."""

from hostile import archives, configuration, files, header, weights
from hostile.corpus import CORPUS

__all__ = ["CORPUS", "archives", "configuration", "files", "header", "weights"]
