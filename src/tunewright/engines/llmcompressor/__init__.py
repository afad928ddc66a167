"""llm-compressor: quantization of 16-bit models for vLLM, in a separate environment."""
