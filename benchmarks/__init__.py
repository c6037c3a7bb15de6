"""Comparisons with peers, each run as ``python -m benchmarks.NAME``; the last results lie in ``docs/results``."""
