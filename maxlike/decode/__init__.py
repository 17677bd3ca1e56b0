"""Text from a trained model: sampling, the compiled decoding loop, strings in and out."""
