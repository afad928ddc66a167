"""The serving check: an engine answers held-out prompts as the model under PEFT does."""
