"""Tests. `python -m pytest` runs them all; `tests.bless` rewrites the contract in formats/; `tests.lab` boots kernels."""
