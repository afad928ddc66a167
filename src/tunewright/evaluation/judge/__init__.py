"""A language model as judge: correctness against the reference, preference in both orders, and controls on itself."""
