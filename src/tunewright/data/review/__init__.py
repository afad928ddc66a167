"""People's verdicts on rows: suspects, acceptance sampling, edits."""
