"""LoRA training on trl and peft."""
