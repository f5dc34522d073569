"""`python -m reval` is the `reval` command."""

import sys

from reval.cli import main

if __name__ == "__main__":
    sys.exit(main())
