"""The engine ``llamacpp``: llama.cpp in a child process, on GGUF files of the base and its adapters."""
