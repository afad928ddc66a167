"""A report that presents the evidence: HTML page and pull request comment."""
