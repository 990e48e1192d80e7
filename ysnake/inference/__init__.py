"""Generating text with a trained model: contexts, sampling, decoding, many requests at once."""
