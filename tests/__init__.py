"""Tests. `python -m pytest` runs all; `tests.bless` rewrites the contract in formats/; `tests.lab` boots kernels."""
