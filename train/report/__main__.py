"""A run as one HTML page, or several beside one another.

    python -m train.report --workdir runs/pixels-digits-0 [--step 500] [--out FILE]
        [--trust]
    python -m train.report --compare runs/a runs/b ... [--out FILE]

A page needs no other file and no network: send it to whom you like. The filters,
spectra and answers are those of one checkpoint, the filters and spectra beside those
that the run began with.
"""

import argparse
import sys

from train import evaluate, settings
from train.report import pages


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="Writes an HTML page about runs."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="of a run")
    which.add_argument("--compare", nargs="+", metavar="RUN", help="workdirs")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    parser.add_argument(
        "--out", help="default: WORKDIR/report.html, or compare.html here"
    )
    evaluate.add_trust(parser)
    options = parser.parse_args(argv)
    if options.compare and options.step is not None:
        parser.error("--step goes with --workdir: --compare takes the newest ones")
    try:
        if options.compare:
            runs = [settings.place("--compare", run) for run in options.compare]
            path = pages.compare(runs, options.out or "compare.html")
        else:
            path = pages.write(
                settings.place("--workdir", options.workdir),
                options.out,
                options.step,
                options.trust,
            )
    except evaluate.PROBLEMS as problem:
        parser.error(str(problem))
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
