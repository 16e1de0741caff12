"""The tables of docs/results.md: every layer, several seeds, one command.

    python -m train.reproduce run NAME [--seeds 0,1,2] [--layers s5,s4d]
    python -m train.reproduce table [--page docs/results.md]
    python -m train.reproduce [--task digits|listops|selective_copying|induction|mqar
                               |moving_digits] [--layers s4d,s5] [--seeds 0,1,2]
                              [--workdir runs/reproduce] [--page docs/results.md]

`run` trains an entry of the ledger, `train.reproduce.entries`, and keeps its rows;
`table` writes the ledger's table from all rows that are kept. `--task` trains and
writes one of the older tables.

A second start goes on where the first stopped. Scores are those of the last checkpoint;
the test split selects nothing. `train.reproduce.contest` has the three tasks of recall,
whose layers have matched parameter counts, `train.reproduce.video` that of video.

`--layers my_package.MyLayer,s5` compares a layer of your own: the table is printed, and
a page is rewritten only where --page names one.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from configs import lra, pixels
from kernels import allocator
from layers.models.build import foreign
from train import checkpoint, data, files
from train.reproduce import baseline, contest, ledger
from train.reproduce import video as video_contest
from train.reproduce.entries import ENTRIES

PAGE = Path("docs/results.md")


class Task(NamedTuple):
    """A table: `make(f"{argument},layer=NAME")` gives the config of a run."""

    make: Callable
    argument: str
    layers: tuple[str, ...]


TASKS = {
    "digits": Task(pixels.get_config, "digits", ("s4d", "s5", "lru", "gru")),
    "listops": Task(lra.get_config, "listops,scale=small", ("s4", "s4d", "s5")),
}


def config_of(task, layer):
    """The config of one row."""
    return TASKS[task].make(f"{TASKS[task].argument},layer={layer}")


def run_one(task, layer, seed, workdir) -> dict:
    """One finished run of a row."""
    config = config_of(task, layer)
    config.seed = seed
    return ledger.trained(config, workdir / f"{task}-{layer}-{seed}")


def table(task: str, layers: Sequence[str], seeds: Sequence[int], workdir: Path) -> str:
    """Markdown: a row per layer (all of the task's if empty) with the median and range
    over seeds."""
    layers = layers or TASKS[task].layers
    dataset = data.load(config_of(task, layers[0]).data)
    lines = [
        "| layer | test accuracy, median (range) | parallel vs recurrent | seconds |",
        "|---|---|---|---|",
    ]
    for layer in layers:
        runs = [run_one(task, layer, seed, workdir) for seed in seeds]
        scores = [run["test"]["accuracy"] for run in runs]
        gaps = [run["parallel_vs_recurrent"] for run in runs]
        gap = max(gaps) if all(isinstance(g, float) for g in gaps) else None
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(
            f"| `{layer}` | {statistics.median(scores):.4f} "
            f"({min(scores):.4f}-{max(scores):.4f}) | "
            f"{'no recurrent mode' if gap is None else f'{gap:.1e}'} | {seconds:.0f} |"
        )
    linear = baseline.logistic_regression(dataset)
    lines += [
        f"| logistic regression | {linear:.4f} | | |",
        "",
        f"`{TASKS[task].argument}`: {dataset.num_examples('test')} sequences to test, "
        f"last checkpoint, seeds {', '.join(map(str, seeds))}; largest difference of "
        "the logits between the two modes; wall-clock with compilation on "
        f"{ledger.machine()}.",
    ]
    return "\n".join(lines)


def rewrite(page: Path, task: str, text: str) -> None:
    """Puts `text` between the task's markers; `ValueError` without them."""
    begin, end = f"<!-- {task}:begin -->", f"<!-- {task}:end -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{page}: must contain the lines {begin} and {end}")
    before, _, tail = old.partition(begin)
    after = tail.partition(end)[2]
    files.write_atomically(page, f"{before}{begin}\n{text}\n{end}{after}")


def run_entry(argv: Sequence[str]) -> int:
    """`python -m train.reproduce run`."""
    parser = argparse.ArgumentParser(prog="python -m train.reproduce run")
    parser.add_argument("name", metavar="NAME", help=", ".join(ENTRIES))
    parser.add_argument("--seeds", default="", help="default: the entry's")
    parser.add_argument("--layers", default="", help="default: the entry's")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--results", type=Path, default=ledger.RESULTS, help="folder of the rows"
    )
    options = parser.parse_args(argv)
    try:
        seeds = _numbers(options.seeds)
        layers = [x for x in options.layers.split(",") if x]
        ledger.run(options.name, seeds, layers, options.workdir, options.results)
        entry = {options.name: ENTRIES[options.name]}
        print(ledger.table(entry, options.results))
    except (ValueError, checkpoint.CheckpointError) as problem:
        parser.error(str(problem))
    return 0


def write_table(argv: Sequence[str]) -> int:
    """`python -m train.reproduce table`."""
    parser = argparse.ArgumentParser(prog="python -m train.reproduce table")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        text = ledger.table()
        rewrite(options.page, ledger.MARK, text)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    print(text)
    return 0


COMMANDS = {"run": run_entry, "table": write_table}


def _numbers(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",") if seed]
    except ValueError:
        raise ValueError(
            f"--seeds must be whole numbers such as 0,1,2, got {text}"
        ) from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(prog="python -m train.reproduce")
    tables = {task: table for task in TASKS}
    tables |= {task: contest.table for task in contest.CONTESTS}
    tables["moving_digits"] = video_contest.table
    parser.add_argument("--task", choices=tables, default="digits")
    parser.add_argument("--layers", default="", help="of the table; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--page",
        "--readme",
        type=Path,
        help=f"to rewrite; default: {PAGE}, none for a layer of your own",
    )
    options = parser.parse_args(argv)
    try:
        seeds = _numbers(options.seeds)
    except ValueError as problem:
        parser.error(str(problem))
    task, layers = options.task, [x for x in options.layers.split(",") if x]
    try:
        text = tables[task](task, layers, seeds, options.workdir)
        if options.page or not foreign({"layer": layers}):
            rewrite(options.page or PAGE, task, text)
    except (ValueError, checkpoint.CheckpointError) as problem:
        parser.error(str(problem))
    print(text)
    return 0


if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
