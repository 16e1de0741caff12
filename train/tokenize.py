"""`python -m train.video.codec`, under the name that it had before 0.2."""

import sys

from train.video.codec import main

if __name__ == "__main__":
    print(
        "python -m train.tokenize is now python -m train.video.codec", file=sys.stderr
    )
    sys.exit(main())
