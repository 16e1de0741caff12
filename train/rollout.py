"""`python -m train.video.rollout`, under the name that it had before 0.2."""

import sys

from train.video.rollout import main

if __name__ == "__main__":
    print(
        "python -m train.rollout is now python -m train.video.rollout", file=sys.stderr
    )
    sys.exit(main())
