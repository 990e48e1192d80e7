"""Writing text with a trained model: contexts, sampling, fast decoding, many requests at once."""
