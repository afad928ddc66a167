"""The engine ``llamacpp``: llama.cpp over GGUF files of the base and its adapters, as a child of the gateway."""
