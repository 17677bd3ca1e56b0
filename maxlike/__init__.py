"""Everything around the network: configuration, data, training, checkpoints, decoding, reports."""
