"""Sweeps over the knobs of an experiment, and the laws that are fitted to what they found."""
