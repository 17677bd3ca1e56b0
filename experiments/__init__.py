"""Experiment files (gin), and the small data they ship with. `python -m launch --list` shows them."""
