"""GGUF files, which llama.cpp and Ollama run: written with the ``gguf`` library's writer, quantizer and tensor names.

The library has no converter. What is written is what llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py
write for ``LlamaForCausalLM`` and ``MistralForCausalLM`` (to llama.cpp both are the architecture "llama").
"""
