"""Checkpoints on disk: ours, which are Hugging Face's, those of state-spaces, and GGUF."""
