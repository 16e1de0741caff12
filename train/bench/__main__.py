"""Speed of layers, training steps and decoding beside textbook forms, on this device.

    python -m train.bench [--suite tokens|video|streams|pictures]
                          [--case mixer|step|step_s4|step_mamba|long_conv|hyena
                          |decode|compile] [--repeats 7] [--small] [--out FILE.json]

Subject and baseline are compiled, then called in turn, so that a busy machine slows
both alike; figures are medians with quartiles, ratios are baseline over subject.
Temporary memory is the compiler's own count; the suite streams has instead how far the
resident set of a process grew that makes one call, and its seconds with the
compilation; the suite pictures counts those of Pathfinder that are drawn in a second.
Freed memory stays with the process; see `kernels.allocator`.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from kernels import allocator
from kernels.bench import timing
from train.bench import pictures, streams, tokens, video

SUITES = {
    "tokens": tokens.suite,
    "video": video.suite,
    "streams": streams.suite,
    "pictures": pictures.suite,
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.bench")
    parser.add_argument("--suite", choices=SUITES, default="tokens")
    parser.add_argument(
        "--case", choices=[*tokens.CASES, "compile"], help="only this one"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="small sizes, seconds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.case and options.suite != "tokens":
        parser.error(f"--case is of the suite tokens, got --suite {options.suite}")
    figures = SUITES[options.suite](options, Console(width=100))
    if options.out:
        options.out.write_text(json.dumps(timing.environment() | figures, indent=1))
    return 0


if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
