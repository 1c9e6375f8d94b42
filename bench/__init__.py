"""Benchmarks: every figure is measured side by side in one run and shown as a ratio. `python -m bench --help`."""
