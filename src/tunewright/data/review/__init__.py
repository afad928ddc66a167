"""Review of rows by people: suspects, acceptance sampling, edits."""
