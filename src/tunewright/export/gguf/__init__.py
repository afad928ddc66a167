"""GGUF files for llama.cpp and Ollama, written with the ``gguf`` library's writer, quantizer and tensor names.

The library has no converter. The files are the same as llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py
write for ``LlamaForCausalLM`` and ``MistralForCausalLM`` (llama.cpp treats both as the architecture "llama").
"""
