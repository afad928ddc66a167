"""The engine ``vllm``: vLLM in an environment of its own, kept running as a child process."""
