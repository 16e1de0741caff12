"""`python -m train.reproduce.baseline`, under the name that it had before 0.2."""

import sys

from train import main as command_line
from train.reproduce.baseline import main

if __name__ == "__main__":
    print(
        "python -m train.baseline is now python -m train.reproduce.baseline",
        file=sys.stderr,
    )
    command_line.command(main)
