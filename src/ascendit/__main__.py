"""`python -m ascendit`. The package has removed the working directory from the path of modules."""

import sys

from ascendit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
