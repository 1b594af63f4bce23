"""Cases for pytest-benchmark (``test_*.py``), and the report that ``make bench`` writes of them."""
