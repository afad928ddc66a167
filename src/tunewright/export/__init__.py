"""Taking an adapter elsewhere: merged models, GGUF, Ollama, each held to the trained model before it is kept."""
