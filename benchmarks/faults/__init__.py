"""A long test with kills, full disks, damaged files and wrong requests. Nothing may be lost.

Run it as `python -m benchmarks.faults`. See docs/robustness.md.
"""
