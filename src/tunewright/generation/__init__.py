"""Text generation: decoding loop, KV cache, batched LoRA, constraints, sampling."""
