"""Prompt, retrieve or fine-tune: three signals and a pilot, measured before anybody spends a weekend on training."""
