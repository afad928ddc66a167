"""Finding, loading and running a base."""
