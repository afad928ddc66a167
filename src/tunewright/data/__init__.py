"""Datasets: raw files to immutable versions with leak-free splits."""
