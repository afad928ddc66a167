"""Prompt optimization: GEPA proposes instructions by a reflection model, training rows score them, dev chooses."""
