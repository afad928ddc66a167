"""Advice to prompt, retrieve, fine-tune or use no model, from signals measured before any full training."""
