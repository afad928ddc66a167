"""An OpenAI-compatible server: one base copy, many adapters."""
