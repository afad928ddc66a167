"""Engines of one protocol: embedded (peft), vLLM and llama.cpp in child processes, and a pool at addresses.

They are below evaluation and training, which also use vLLM. Their start for a server is in ``serving/engine_start``.
"""
