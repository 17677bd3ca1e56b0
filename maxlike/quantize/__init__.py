"""Quantization of trained networks: weights, activations and the decoding cache in few bits, and what it costs."""
