"""Measurements, and estimates to compare them with. Run each as `python -m benchmarks.<name>`."""
