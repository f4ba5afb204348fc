"""`python -m lmpipe` is the command `lmpipe`."""

import sys

from lmpipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
