"""Conversations to tokens, in the base's own chat template."""
