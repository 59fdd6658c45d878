"""Studies and benchmarks of the repository: `python -m experiments.head_to_head`."""
