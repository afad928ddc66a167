"""Engines in processes of their own, which serving and evaluation share: the child process, its protocol, vLLM."""
