"""Benchmarks and measured proofs; every number in README comes from a file that one of these writes."""
