"""One file per op: all that the benchmarks know of it."""
