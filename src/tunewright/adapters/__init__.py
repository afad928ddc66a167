"""Trained adapters: immutable folders with their lineage."""
