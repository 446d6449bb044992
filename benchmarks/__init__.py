"""Benchmarks and experiments of a source checkout: `python -m benchmarks` lists the programs."""
