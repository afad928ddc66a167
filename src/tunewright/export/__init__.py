"""Exporting adapters to other engines: merged models, GGUF and Ollama, each compared with the trained model first."""
