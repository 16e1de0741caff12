"""`python -m layers.laws.rounding`, under the name that it had before 0.2."""

import sys

from layers.laws.rounding import main

if __name__ == "__main__":
    print(
        "python -m layers.rounding is now python -m layers.laws.rounding",
        file=sys.stderr,
    )
    sys.exit(main())
