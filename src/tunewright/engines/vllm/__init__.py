"""The engine ``vllm``: vLLM in a separate environment, kept running as a child process."""
