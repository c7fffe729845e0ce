"""`python -m ascendit`."""

import sys

from ascendit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
