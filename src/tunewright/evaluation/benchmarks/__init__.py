"""What the base could do before: suites measured with the adapter off and on, and whether they may decide."""
