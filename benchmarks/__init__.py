"""Benchmarks: `python -m benchmarks.bench_ops` measures, `python -m benchmarks.report` writes the tables."""
