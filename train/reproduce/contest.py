"""Several layers on one synthetic task: a comparison at matched parameter counts.

All contenders have the same number of parameters, within a tenth, by the choice of
their features, and the same learning rates to choose from: that of RATES whose last
step is best on validation, trained with the first seed. The test selects nothing.
"""

import bisect
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import synthetic
from layers.models.build import build, foreign
from train import data, evaluate, files, records, resolve, runs, state
from train.reproduce import ledger

RATES = (1e-3, 3e-3, 1e-2)
TOLERANCE = 0.1
FEATURES = range(4, 1025, 4)  # of the contenders; heads divide them


class Contender(NamedTuple):
    """A row: a layer, those of its fields that differ, and what a paper reports."""

    layer: str
    layer_args: Mapping
    published: str


class Contest(NamedTuple):
    """A table: `make(f"{argument},layer=NAME")` gives a run before its match."""

    make: Callable
    argument: str
    parameters: int
    lengths: tuple[int, ...]  # tested at so many training lengths
    contenders: tuple[Contender, ...]


# Published accuracies are those of larger models on longer sequences:
# https://arxiv.org/abs/2312.00752 and, for mqar, https://arxiv.org/abs/2312.04927 and
# https://arxiv.org/abs/2402.18668.
RISES = "rises with the state"
CONTESTS = {
    "selective_copying": Contest(
        synthetic.get_config,
        "selective_copying",
        parameters=50_000,
        lengths=(1,),
        contenders=(
            Contender("s4d", {}, "0.183 (S4)"),
            Contender("mamba", {}, "0.998"),
        ),
    ),
    "induction": Contest(
        synthetic.get_config,
        "induction",
        parameters=50_000,
        lengths=(1, 2, 4, 8),
        contenders=(
            Contender("attention", {"heads": 2}, "0.836 at 2x"),
            Contender("mamba", {}, "1 at every length"),
            Contender("s4d", {}, "not reported"),
            Contender("hyena", {}, "1 at 2x, 0.441 at 4x"),
        ),
    ),
    "mqar": Contest(
        synthetic.get_config,
        "mqar",
        parameters=50_000,
        lengths=(1,),
        contenders=(
            Contender("s4d", {"state_size": 16}, "fails: weights do not see the input"),
            Contender("s4d", {"state_size": 128}, "fails"),
            Contender("mamba", {"state_size": 1}, RISES),
            Contender("mamba", {"state_size": 16}, RISES),
            Contender("mamba2", {"state_size": 4, "head_size": 8}, RISES),
            Contender("mamba2", {"state_size": 64, "head_size": 8}, RISES),
            Contender("gated_delta_net", {"heads": 4}, RISES),
            Contender("gated_delta_net", {"heads": 1}, RISES),
            Contender("attention", {"heads": 2, "window": 4}, "no more than it sees"),
            Contender("attention", {"heads": 2}, "1"),
        ),
    ),
}


def parameters(config: ConfigDict) -> int:
    """How many numbers the model of a resolved config learns; computes none."""
    inputs = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)
    shapes = state.param_shapes(build(config.model), {"inputs": inputs})
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def state_floats(config: ConfigDict) -> int:
    """How many floats the recurrent state of one sequence has; a complex number has
    two, what only counts has none."""
    model = build(config.model)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1)))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(
        leaf.size * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        for leaf in floats
    )


def match_parameters(config: ConfigDict, budget: int) -> None:
    """Sets model.features so that the parameters come closest to `budget`.

    Raises:
        ValueError: the closest number is more than TOLERANCE away.
    """

    def count(features):
        config.model.features = features
        return parameters(config)

    above = bisect.bisect_left(FEATURES, budget, hi=len(FEATURES) - 1, key=count)
    nearest = FEATURES[max(above - 1, 0) : above + 1]
    config.model.features = min(nearest, key=lambda f: abs(count(f) - budget))
    total = parameters(config)
    if abs(total / budget - 1) > TOLERANCE:
        raise ValueError(
            f"parameters must be within {TOLERANCE:.0%} of {budget:,}; {total:,} with "
            f"{config.model.features} features are the closest of {config.model.layer}"
        )


def config_of(contest: Contest, contender: Contender) -> ConfigDict:
    """The resolved config of one row."""
    config = contest.make(f"{contest.argument},layer={contender.layer}")
    config.model.layer_args.update(contender.layer_args)
    config = resolve.complete(config, data.load(config.data).spec)
    match_parameters(config, contest.parameters)
    return config


def label(contender: Contender) -> str:
    """The row's name, which is also that of its folders."""
    arguments = [f"{name}={value}" for name, value in contender.layer_args.items()]
    return ",".join([contender.layer, *arguments])


class Row(NamedTuple):
    """What came out for one contender."""

    contender: Contender
    config: ConfigDict
    seconds: float
    accuracies: list[list[float]]  # a list over lengths for every seed


def run_contender(
    contest: Contest, contender: Contender, seeds: Sequence[int], workdir: Path
) -> Row:
    """Chooses the learning rate of a contender, trains it with all seeds and tests it.

    Raises:
        FloatingPointError: no rate, or another seed, ended with finite numbers.
    """
    config = config_of(contest, contender)

    def run(rate, seed):
        config.optimizer.lr, config.seed = rate, seed
        folder = workdir / f"{contest.argument}-{label(contender)}-{rate}-{seed}"
        return ledger.trained(config, folder), folder

    quality = {}
    for rate in RATES:
        try:
            quality[rate] = _last_validation(run(rate, seeds[0])[1])
        except FloatingPointError as problem:
            print(f"learning rate {rate} is out: {problem}", flush=True)
    if not quality:
        raise FloatingPointError(f"{label(contender)}: finite at none of {RATES}")
    best = max(quality, key=quality.get)
    best_runs = [run(best, seed) for seed in seeds]
    config.optimizer.lr = best
    return Row(
        contender,
        config,
        statistics.median(results["seconds"] for results, _ in best_runs),
        [_tested(contest, folder, results["step"]) for results, folder in best_runs],
    )


def _last_validation(folder: Path) -> tuple[float, float]:
    """Accuracy and, for those that are equal, the loss, more being better."""
    rows = [r for r in records.read_metrics(folder) if r["split"] == "validation"]
    return rows[-1]["accuracy"], -rows[-1]["loss"]


def _tested(contest: Contest, folder: Path, step: int) -> list[float]:
    """Test accuracy at every length of the contest."""
    path = folder / evaluate.LENGTHS
    record = files.read_json(path) or {}
    rows = record.get("lengths")
    rows = rows if isinstance(rows, list) else []
    times = [r.get("times") for r in rows if isinstance(r, dict) and "accuracy" in r]
    if (record.get("step"), tuple(times)) != (step, contest.lengths):
        run = runs.load_run(folder, trust=True)  # of the layer that was asked for
        record = evaluate.at_lengths(run, folder, "test", contest.lengths)
    return [row["accuracy"] for row in record["lengths"]]


def table(name: str, layers: Sequence[str], seeds: Sequence[int], workdir: Path) -> str:
    """Markdown: a row per contender with the median and range over seeds.

    Args:
        name: of the contest.
        layers: only these, or others by their dotted paths; all if empty.
        seeds: of the runs; the first also chooses the learning rate.
        workdir: gets a folder for every run; those that are finished stay as they are.

    Raises:
        ValueError: layers that are no contenders, or parameter counts that cannot be
            matched.
    """
    contest = CONTESTS[name]
    names = {contender.layer for contender in contest.contenders}
    own = [name for name in foreign({"layer": layers}) if "." in name]
    unknown = sorted({*layers} - names - {*own})
    if unknown:
        raise ValueError(
            f"--layers must be among {', '.join(sorted(names))}, got {unknown[0]!r}; a "
            "layer of your own by its dotted path"
        )
    chosen = [c for c in contest.contenders if not layers or c.layer in layers]
    chosen += [Contender(name, {}, "") for name in dict.fromkeys(own)]
    rows = [run_contender(contest, contender, seeds, workdir) for contender in chosen]
    titles = ["layer", "features", "parameters", "state", "lr"]
    titles += [f"test at {n}x" for n in contest.lengths] + ["published", "seconds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    config = rows[0].config
    lines += [
        "",
        f"`configs/synthetic.py:{contest.argument}`: {config.train.steps} steps of "
        f"{config.train.batch_size} sequences of {config.data.length} tokens; accuracy "
        "of the answers, median (range) over the seeds "
        f"{', '.join(map(str, seeds))}, last checkpoint; the best of the learning "
        f"rates {', '.join(f'{rate:g}' for rate in RATES)} on validation with seed "
        f"{seeds[0]}; state: floats per sequence, caches at full capacity; seconds per "
        "run with compilation on "
        f"{ledger.machine()}. Published: of larger models on longer sequences.",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    by_length = zip(*row.accuracies, strict=True)
    return [
        f"`{label(row.contender)}`",
        str(row.config.model.features),
        f"{parameters(row.config):,}",
        f"{state_floats(row.config):,}",
        f"{row.config.optimizer.lr:g}",
        *(f"{statistics.median(a):.3f} ({min(a):.3f}-{max(a):.3f})" for a in by_length),
        row.contender.published,
        f"{row.seconds:.0f}",
    ]
