"""What `migstream check` says, against what real kernels of the lab answer: `python -m tests.verdicts`."""
