"""Benchmarks of co-serving: loads, measures, the machine's bound, the driver over policies, the page of results."""
