"""Makes data sets before a run needs them: `python -m train.data.prepare`.

    python -m train.data.prepare --dataset pathx --workers 8
    python -m train.data.prepare --dataset pathfinder32 --limit 5000
    python -m train.data.prepare --dataset retrieval --path lra_release.gz

A run makes such data itself where they are not there; this command does it on a
machine without an accelerator, and says how long it took. Killed, the same command goes
on where it was. What it makes depends on the data set, its files, the limit and the
seed, not on the workers: it prints a digest of it, and the command that trains on it.
"""

import argparse
import inspect
import sys
import time

from configs.lra import SIDES
from train import settings
from train.data import aan, imdb, listops, lra_release, pathfinder, prepared
from train.data.sources import SPLITS

# What prepares a data set, a task of `configs/lra.py`, and its arguments.
DATASETS = {
    "listops": (listops.prepare, {}),
    "text": (imdb.prepare, {}),
    "retrieval": (aan.prepare, {}),
    **{task: (pathfinder.prepare, dict(side=side)) for task, side in SIDES.items()},
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare",
        description="Makes a data set below a folder, or goes on making it.",
    )
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="which one")
    parser.add_argument("--folder", help="gets it; default: as in configs/lra.py")
    parser.add_argument(
        "--path", help="the arena's own files to convert, or lra_release.gz with them"
    )
    parser.add_argument("--seed", type=int, help="of data that are made; default: 0")
    parser.add_argument(
        "--workers", type=int, help="processes; default: one for each processor"
    )
    parser.add_argument(
        "--limit", type=int, help="examples of each split at most; default: all"
    )
    parser.add_argument(
        "--download", action="store_true", default=None, help="fetch what is missing"
    )
    options = parser.parse_args(argv)
    make, given = DATASETS[options.dataset]
    start = time.perf_counter()
    try:
        asked = _asked(options, inspect.signature(make).parameters)
        home = make(**given, **asked)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    counts = ", ".join(
        f"{len(prepared.Records(paths, bytes)):,} {split}"
        for split, paths in prepared.by_split(home).items()
    )
    print(f"{home}: {options.dataset}, {counts} examples, in {seconds:.1f} s")
    print(f"sha256 {prepared.digest(home)}")
    for_run = {k: v for k, v in asked.items() if k not in ("workers", "download")}
    flags = [f"--config.data.{key}={value}" for key, value in for_run.items()]
    task = f"lra:{options.dataset},scale=paper"  # whose data these are
    print(" ".join(["python -m train.main --config", task, *flags]))
    return 0


def _asked(options, parameters) -> dict:
    """The arguments that the flags give to what prepares the data set.

    Raises:
        ValueError: a flag that this data set has no use for, or a value out of bounds.
    """
    asked = {
        key: getattr(options, key)
        for key in ("folder", "path", "seed", "workers", "download")
        if getattr(options, key) is not None
    }
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be 1 or more, got {options.limit}")
        if options.path:
            raise ValueError("--limit must go without --path, whose files are read")
        sizes = {s: parameters[s].default for s in SPLITS if s in parameters}
        limited = {s: min(size, options.limit) for s, size in sizes.items()}
        asked |= limited or {"limit": options.limit}
    unknown = [key for key in asked if key not in parameters]
    if unknown:
        raise ValueError(f"--{unknown[0]} is not for the data set {options.dataset}")
    path = settings.place("--path", options.path or "")
    if options.path and path.is_file():
        folder = settings.place("--folder", asked.get("folder", "data"))
        part = lra_release.unpack(path, options.dataset, folder / "lra_release")
        asked["path"] = str(part)
    return asked


if __name__ == "__main__":
    sys.exit(main())
