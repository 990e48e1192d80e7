"""The fused operators on a GPU: are they right, how fast are they, and which settings are best.

`python -m benchmarks.gpu --call all --out DIR` runs every stage; docs/gpu.md says what each does.
"""
