"""`python -m ascendit`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # The working directory comes first; it may be a checkpoint with a torch.py
    del sys.path[0]

from ascendit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
