"""Domain projects that run: what ``tunewright init --example`` writes."""
