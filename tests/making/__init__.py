"""Makers of bases, projects and evidence; servers that stand in for others; ways to run a command."""
