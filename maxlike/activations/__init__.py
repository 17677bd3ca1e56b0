"""Statistics of what flows through a trained network: kurtosis, norms, attention sinks, gates."""
