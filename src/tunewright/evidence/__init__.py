"""Schemas, statistics and verdict of evaluations; never imports torch."""
