"""Asking a model: a journal keeps each answer, and an endpoint is asked with limits, retries and a budget."""
