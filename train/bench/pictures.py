"""The suite over pictures: how fast Pathfinder is drawn, alone and by all cores."""

import os
import statistics
import tempfile
import time

from rich.table import Table

from train.data import pathfinder, snakes

COUNTS = {32: 1_000, 64: 500, 128: 200, 256: 50, 512: 15}  # pictures of a repeat
SMALL = {16: 32, 32: 16}
WHOLE = 128, 4_000  # Path-X, as it is prepared: drawn, packed, written, digested
WHOLE_SMALL = 16, 1_000
HEADINGS = ("side", "what", "processes", "pictures", "a second and core (quartiles)")


def drawn(side: int, count: int, repeats: int) -> dict:
    """Pictures a second of one process, which only draws."""
    rules, rates = pathfinder.RULES[side], []
    for repeat in range(repeats):
        numbers = range(repeat * count, (repeat + 1) * count)
        start = time.perf_counter()
        snakes.draw(rules, numbers, 0, 0)
        rates.append(count / (time.perf_counter() - start))
    return _row(side, "drawn", 1, count, rates)


def prepared(side: int, count: int, repeats: int) -> dict:
    """Pictures a second and process of a whole preparation, one process for each core
    where there are as many files, their starts included."""
    shards = -(-count // (pathfinder.IN_A_SHARD // side**2))
    processes, rates = min(os.cpu_count() or 1, shards), []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            pathfinder.prepare(
                folder,
                side=side,
                train=count,
                validation=0,
                test=0,
                workers=processes,
            )
            seconds = time.perf_counter() - start
        rates.append(count / seconds / processes)
    return _row(side, "prepared", processes, count, rates)


def _row(side, what, processes, count, rates) -> dict:
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return {
        "side": side,
        "what": what,
        "processes": processes,
        "pictures": count,
        "median": statistics.median(rates),
        "quartiles": (low, high),
    }


def suite(options, console) -> dict:
    """Its figures: a row for each side, and one for a whole preparation."""
    counts = SMALL if options.small else COUNTS
    found = [drawn(side, count, options.repeats) for side, count in counts.items()]
    whole = WHOLE_SMALL if options.small else WHOLE
    found.append(prepared(*whole, min(options.repeats, 3)))
    table = Table(*HEADINGS, title="pictures")
    for row in found:
        table.add_row(*cells(row))
    console.print(table)
    return {"pictures": found}


def cells(row: dict) -> tuple[str, ...]:
    """A row in words, under HEADINGS; docs/data.md has them."""
    low, high = row["quartiles"]
    rate = f"{row['median']:.1f} ({low:.1f}-{high:.1f})"
    numbers = str(row["processes"]), f"{row['pictures']:,}"
    return str(row["side"]), row["what"], *numbers, rate
