"""A standing test: kills, full disks, damaged files and odd requests, and nothing may be lost.

Run it as `python -m benchmarks.faults`. See docs/robustness.md.
"""
