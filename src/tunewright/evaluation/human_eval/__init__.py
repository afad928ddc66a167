"""Blind comparison of the arms' answers by people: sampling, verdicts, and estimates for all test items."""
