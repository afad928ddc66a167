"""Preference tuning: DPO, ORPO and KTO on the trainer of `tunewright.training`, with trl's losses."""
