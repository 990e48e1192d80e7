"""Measurements and models of them. Run each as `python -m benchmarks.<name>`."""
