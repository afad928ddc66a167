"""Arms, generation, metrics, statistics, evidence, verdict."""
