"""Shared foundations: errors, file I/O, CSV, time, progress and wording."""
