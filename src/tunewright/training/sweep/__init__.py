"""Learning-rate sweep by successive halving."""
