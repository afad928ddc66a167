"""The cases of benchmarks/gpu_proof.py. Each runs in a separate process and reports every measurement immediately.

This package imports neither torch nor tunewright at its top level: a case's environment must be set first.
"""
