"""A training run: its settings, its folder, the loop over steps, and many processes."""
