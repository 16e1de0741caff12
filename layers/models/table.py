"""The layers in one table, from what their files say of themselves.

python -m layers.models.table            # Markdown, a row a layer
python -m layers.models.table --fields   # their fields, as LAYER_ARGS has them
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn

from layers.contract import FROM_MODEL
from layers.laws.examples import cases
from layers.models.build import FRAME_LAYERS, LAYERS

ROOT = Path(__file__).parents[2]


def rows() -> Iterator[tuple[str, ...]]:
    """Of every layer its name, what it is, its papers, its file and what it refuses."""
    for name, cls in (LAYERS | FRAME_LAYERS).items():
        module = sys.modules[cls.__module__]
        summary = " ".join(module.__doc__.split("\n\n")[0].split())
        description, _, sources = summary.partition(" (https:")
        papers = re.findall(r"https:[^\s,)]+", "https:" + sources)
        layer = cases(name, cls)[name]()
        yield (
            f"`{name}`",
            description,
            ", ".join(f"[{_title(paper)}]({paper})" for paper in papers),
            f"`{Path(inspect.getfile(cls)).relative_to(ROOT).as_posix()}`",
            ", ".join(f"`{word}`" for word in getattr(layer, "REFUSES", ())),
        )


def markdown() -> str:
    """The table of `rows`."""
    head = ("layer", "what it is", "paper", "file", "refuses")
    lines = [head, ("---",) * len(head), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields(cls: type[nn.Module]) -> dict:
    """The fields of a layer that `layer_args` may give, with their defaults."""
    declared = [f for f in dataclasses.fields(cls) if f.name not in {"parent", "name"}]
    return {f.name: f.default for f in declared if f.name not in FROM_MODEL}


def _title(paper):
    arxiv = re.search(r"arxiv\.org/abs/(.+)", paper)
    return f"arXiv:{arxiv[1]}" if arxiv else paper.split("/")[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m layers.models.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fields", action="store_true")
    if parser.parse_args(argv).fields:
        for name, cls in (LAYERS | FRAME_LAYERS).items():
            arguments = ", ".join(
                f"{key}={value!r}" for key, value in fields(cls).items()
            )
            arguments = arguments.replace("inf", 'float("inf")')
            print(f'    "{name}": dict({arguments}),')
    else:
        print(markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
