"""People compare the arms' answers, blind: which pairs, who said what, and what follows for all test items."""
