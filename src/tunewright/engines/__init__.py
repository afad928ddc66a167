"""Engines in child processes, shared by serving, evaluation and training: the child, its protocol, and vLLM.

They are not in ``serving/engines`` since evaluation and training import them, and imports run one way.
"""
