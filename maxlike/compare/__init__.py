"""Comparing experiments: a claim is an arm, its baseline is another, and a rule written before the runs judges."""
