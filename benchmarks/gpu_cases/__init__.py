"""The cases of benchmarks/gpu_proof.py. Each runs in a process of its own and reports every measurement as it is made.

This package imports neither torch nor tunewright at its top level: a case's environment has to be set before that.
"""
