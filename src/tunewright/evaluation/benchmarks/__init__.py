"""Regression suites: abilities of the base, measured with the adapter off and on, and their controls."""
