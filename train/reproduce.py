"""The README's table: every layer, several seeds, one command.

    python -m train.reproduce [--layers s4d,s5,lru,gru] [--seeds 0,1,2]
                              [--workdir runs/reproduce] [--readme README.md]

A second start goes on where the first stopped. Scores are those of the last checkpoint;
the test split selects nothing.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs.pixels import get_config as task
from train import checkpoint, data, loop

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SECONDS = "seconds.json"


def run_one(layer, seed, workdir) -> dict:
    """One finished run: its results, and the seconds it took, compilation included."""
    config = task(f"digits,layer={layer}")
    config.seed = seed
    begun = time.monotonic()
    results = loop.run(config, workdir)
    if "stopped" in results:  # by SIGTERM or Ctrl-C; the next start goes on from here
        raise SystemExit(0)
    kept = workdir / SECONDS
    if not kept.exists():
        seconds = time.monotonic() - begun
        checkpoint.write_atomically(kept, json.dumps(seconds))
    return results | {"seconds": json.loads(kept.read_text())}


def logistic_regression() -> float:
    """Test accuracy of a linear classifier on the same pixels and split."""
    from sklearn.linear_model import LogisticRegression

    dataset = data.load(task("digits").data)

    def arrays(split):
        count = dataset.num_examples(split)
        batch = next(iter(dataset.evaluation(split, count)))
        return batch["inputs"].reshape(count, -1), batch["targets"]

    x, y = map(np.concatenate, zip(arrays("train"), arrays("validation"), strict=True))
    return LogisticRegression(max_iter=2000).fit(x, y).score(*arrays("test"))


def table(found, seeds) -> str:
    """Markdown: a row per layer with the median and range over seeds."""
    lines = [
        "| layer | test accuracy, median (range) | parallel vs recurrent | seconds |",
        "|---|---|---|---|",
    ]
    for layer, runs in found.items():
        scores = [run["test"]["accuracy"] for run in runs]
        gaps = [run["parallel_vs_recurrent"] for run in runs]
        gap = max(gaps) if all(isinstance(g, float) for g in gaps) else None
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(
            f"| `{layer}` | {statistics.median(scores):.4f} "
            f"({min(scores):.4f}-{max(scores):.4f}) | "
            f"{'no recurrent mode' if gap is None else f'{gap:.1e}'} | {seconds:.0f} |"
        )
    lines += [
        f"| logistic regression on all pixels | {logistic_regression():.4f} | | |",
        "",
        f"`digits`: 360 test images, last checkpoint, seeds "
        f"{', '.join(map(str, seeds))}; largest difference of the logits between the "
        f"two modes; wall-clock with compilation on {jax.devices()[0].device_kind} "
        f"({platform.machine()}, {len(jax.devices())} device), jax {jax.__version__}.",
    ]
    return "\n".join(lines)


def rewrite(readme: Path, text: str) -> None:
    """Puts `text` between the markers of `readme`; `ValueError` without them."""
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"{readme}: must contain the lines {BEGIN} and {END}")
    before, _, rest = old.partition(BEGIN)
    after = rest.partition(END)[2]
    new = f"{before}{BEGIN}\n{text}\n{END}{after}"
    checkpoint.write_atomically(readme, new)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.reproduce")
    parser.add_argument("--layers", default="s4d,s5,lru,gru")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(argv)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(
            f"--seeds must be whole numbers such as 0,1,2, got {options.seeds}"
        )
    found = {}
    try:
        for layer in options.layers.split(","):
            found[layer] = [
                run_one(layer, seed, options.workdir / f"digits-{layer}-{seed}")
                for seed in seeds
            ]
        rewrite(options.readme, table(found, seeds))
    except (ValueError, checkpoint.CheckpointError) as problem:
        parser.error(str(problem))
    print(table(found, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
