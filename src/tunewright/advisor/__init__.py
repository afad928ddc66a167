"""Advice to prompt, retrieve or fine-tune, from three signals and a pilot measured before any full training."""
