"""Measurements of speed and memory, kept as records under benchmarks/."""
