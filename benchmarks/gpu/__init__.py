"""What ``make gpu`` runs: ``python -m benchmarks.gpu --results DIR``."""
