"""Benchmarks: cases for pytest-benchmark (``test_*.py``), and ``python -m benchmarks.report``, which ``make bench`` runs."""
