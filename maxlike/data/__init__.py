"""Documents to batches: sources, tokenizers, the token and row layers, mixtures and the loader."""
