"""Checks and timings of the fused operators on a GPU, and a search for their best settings.

`python -m benchmarks.gpu --call all --out DIR` runs every stage; docs/gpu.md says what each does.
"""
