"""`python -m migstream`."""

import sys

from migstream.cli import main

sys.exit(main())
