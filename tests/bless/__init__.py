"""Everything under formats/ that is made from code: `python -m tests.bless` writes it, `test_formats.py` holds it."""
