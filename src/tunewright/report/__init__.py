"""A page that shows the evidence to people."""
