"""From raw files to an immutable, leak-free dataset version."""
