"""Advice to prompt, retrieve or fine-tune, from three signals measured before any full training."""
