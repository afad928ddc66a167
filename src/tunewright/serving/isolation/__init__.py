"""Isolation test: proof that an engine never answers with another tenant's adapter."""
