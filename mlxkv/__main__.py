"""`python -m mlxkv`: the command line."""

import sys

from mlxkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
