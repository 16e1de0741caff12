"""Scores of a trained run, and its recurrent mode beside its parallel one.

python -m train.evaluate --workdir runs/pixels-digits-0 [--split test] [--step 500]
    [--examples 1000] [--data new.npz] [--chunk 65536]

--chunk N reads every sequence N tokens at a time, the state carried on, in memory that
does not grow with the length (of a row of a batch; there are as many rows as without).
The scores are the same up to rounding; the two modes are not compared.
--examples N scores only the first N of the split (needed for endless splits).
--data scores on another file, laid out as that of the run and read as that was: its
normalisation, its classes, its vocabulary. All of it counts as the split "test", unless
it has a key "split" of its own. The data that the run was trained on need not be there.
With --lengths 1,2,4,8 instead the scores on sequences as long as in training and 2, 4
and 8 times as long, where the dataset can make such; also in <workdir>/lengths.json.

What a workdir may do. A workdir from elsewhere is data: reading it, here and in
`train.report`, `train.generate`, `train.predict`, `train.video.rollout` and
`train.video.codec`, and as data.codec or train.init_from, runs no code that it holds or
names. A layer that is not of this project, and a function that returns a data set, are
imported by their dotted paths, from wherever Python finds them, the folder of the run
included; so a run that names one is refused unless --trust says that its code may run.
The process that trained a run needs no flag to evaluate it at its end: there the config
came from its own command line. What a workdir's config can do without the flag is to
name the files that its dataset reads (data.path, data.folder, data.codec), the folder
below which listops keeps what it generates and mnist and cifar what they fetch from
their published addresses, and how much time and memory it takes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from layers.facts import has_state
from ssm.sequence import Sequence
from train import (
    checkpoint,
    data,
    files,
    losses,
    runs,
    settings,
    sharding,
    signals,
    step,
    stream,
)
from train.data import own, unseen

LENGTHS = "lengths.json"
# What a command says in one line.
PROBLEMS = (ValueError, OSError, checkpoint.CheckpointError)
MOST = 10_000_000  # examples of the largest split scored without --examples


def recurrent_outputs(model, variables, inputs, sequence=None):
    """The model's answers after every token, fed one by one: [L, B, ...].

    Args:
        model: a model with a recurrent mode.
        variables: of the model.
        inputs: as the model takes them; an image is read pixel by pixel, a video frame
            by frame.
        sequence: mask, reset and dt [B, L] ([B, 2, L] for documents), or None.
    """
    axis = 2 if model.head == "retrieval" else 1
    batch, places = len(jax.tree.leaves(inputs)[0]), (axis,)
    if model.encoder == "image":
        places = (1, 2)
        inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), (inputs, sequence))

    def feed(state, token):
        x, part = token
        x = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, places), x)
        part = jax.tree.map(lambda f: jnp.expand_dims(f, -1), part)
        y, state = model.apply(variables, x, state, part)
        return state, y

    _, outputs = jax.lax.scan(feed, model.init_state(batch), tokens)
    return outputs


def compare_modes(model, variables, batch) -> float | None:
    """max |parallel - recurrent| over the model's outputs on one batch, the recurrent
    mode fed token by token; None for a model that has no recurrent mode."""
    if not has_state(model):
        return None

    @jax.jit
    def difference(variables, inputs, sequence):
        parallel, _ = model.apply(variables, inputs, sequence=sequence)
        recurrent = recurrent_outputs(model, variables, inputs, sequence)
        if model.head == "token":
            recurrent = jnp.moveaxis(recurrent[:, :, 0], 0, 1)
        else:
            recurrent = recurrent[-1]
        return jnp.max(jnp.abs(parallel - recurrent))

    sequence = Sequence(batch["mask"], batch.get("reset"), batch.get("dt"))
    return float(difference(variables, batch["inputs"], sequence))


def scores(run: runs.Run, split: str, chunk: int | None = None) -> dict[str, float]:
    """Loss and metrics of a run on one split of its dataset.

    Args:
        run: a trained run.
        split: of its dataset.
        chunk: tokens of a sequence that are read at once, see `train.stream`; None for
            as many as in training, which is all unless it had `train.chunk`.

    Raises:
        ValueError: a split that the dataset does not have, or that it draws without
            end; a chunk below 1, or for a model that cannot read in pieces, or
            sequences that it could not read at once.
        Stopped: a signal came.
    """
    spec, mesh = run.spec, sharding.rows_mesh()
    loss, count = losses.make(spec.loss), run.dataset.num_examples(split)
    if count > MOST:
        raise ValueError(
            f"split {split} has {count:,} examples; --examples N scores the first N"
        )
    if chunk is None:
        chunk = run.config.train.chunk or None
    if chunk is None:
        eval_step = step.make_eval_step(run.model, loss, spec.padded, mesh)
        return on_split(eval_step, run.variables, run.dataset, split, run.config, mesh)
    stream.check("--chunk", chunk, run.model)
    number = jnp.int32 if spec.encoder == "token" else jnp.float32
    shape = (1, spec.length, spec.channels)[: 2 if spec.encoder == "token" else 3]
    whole = jax.ShapeDtypeStruct(shape, number)
    check_call(run, "--chunk: inputs", run.model.apply, whole, Sequence())
    batches = -(-count // sharding.evaluation_batch_size(run.config, mesh, count))
    pieces = batches * -(-spec.length // chunk)
    with stream.bar("evaluating", pieces) as advance:
        eval_step = stream.make_eval_step(
            run.model, loss, spec.padded, mesh, chunk, advance
        )
        return on_split(eval_step, run.variables, run.dataset, split, run.config, mesh)


def on_split(
    eval_step: Callable,
    variables: dict,
    dataset: data.Dataset,
    split: str,
    config: ConfigDict,
    mesh: Mesh,
) -> dict[str, float]:
    """Means of what `eval_step` sums over `split`.

    Raises:
        Stopped: a signal came.
    """
    count = dataset.num_examples(split)
    size = sharding.evaluation_batch_size(config, mesh, count)
    rows = sharding.own_rows(mesh, size)
    batches = signals.stoppable(dataset.evaluation(split, size, rows))
    return step.mean_scores(eval_step, variables, batches)


def at_lengths(
    run: runs.Run,
    workdir,
    split: str,
    times: Iterable[int],
    examples: int | None = None,
    chunk: int | None = None,
) -> dict:
    """Scores on sequences of several lengths, printed and kept in workdir/lengths.json.

    Args:
        run: a trained run, read back from `workdir`.
        workdir: of the run.
        split: of the dataset.
        times: lengths in training lengths, such as (1, 2, 4, 8).
        examples: N, to score only the first N; None for all.
        chunk: see `scores`.

    Returns:
        {"step", "split", "lengths": [{"times", "length", loss and metrics}, ...]}

    Raises:
        ValueError: a dataset that has one length only, or a layer whose capacity
            (model.length) is smaller.
    """
    rows = []
    for n in times:
        dataset = data.stretched(run.config.data, n)
        dataset = dataset if examples is None else dataset.shortened(examples)
        config = run.config.copy_and_resolve_references()
        options = config.train
        # As many tokens at once as in training: memory must do for those.
        size = (options.eval_batch_size or options.batch_size) // n
        options.eval_batch_size = max(1, size)
        stretched = dataclasses.replace(run.on(dataset), config=config)
        length = {"times": n, "length": dataset.spec.length}
        rows.append(length | scores(stretched, split, chunk))
    found = {"step": run.step, "split": split, "lengths": rows}
    if jax.process_index() == 0:
        path = Path(workdir) / LENGTHS
        files.write_atomically(path, json.dumps(found, indent=2) + "\n")
        _print_lengths(found)
    return found


def _print_lengths(found: dict) -> None:
    table = Table(title=f"{found['split']}, step {found['step']}")
    for name in found["lengths"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in found["lengths"]:
        table.add_row(
            *(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values())
        )
    Console().print(table)


def on_file(run: runs.Run, path: str | Path) -> runs.Run:
    """The run on another file or folder with targets, see `train.data.unseen.labelled`.

    Raises:
        ValueError: what the run cannot be scored on.
    """
    per_token = getattr(run.model, "head", "") == "token"
    trained = run.config.data
    keys = {key: trained[key] for key in own.Options._fields if key in trained}
    options = own.Options(**keys) if trained.name == unseen.OWN else unseen.EVERY
    dataset = unseen.labelled(path, run.spec, trained.name, per_token, options)
    split = next(iter(dataset.sources))
    batch = next(iter(dataset.evaluation(split, 1)))
    sequence = Sequence(batch["mask"], batch.get("reset"), batch.get("dt"))
    check_call(run, f"{path}: inputs", run.model.apply, batch["inputs"], sequence)
    return run.on(dataset)


def check_call(
    run: runs.Run,
    where: str,
    answer: Callable,
    inputs: np.ndarray,
    sequence: Sequence,
    cure: str = "",
) -> None:
    """Raises a `ValueError` for inputs that the run's model refuses, such as those that
    are too long for it, before any are read.

    Args:
        run: that is asked.
        where: what the message begins with.
        answer: (variables, inputs, state, sequence) -> answers, state.
        inputs, sequence: what is to be answered to.
        cure: what ends the message where they are longer than in training.
    """
    try:
        jax.eval_shape(answer, run.variables, inputs, None, sequence)
    except ValueError as problem:
        longer = ""
        if inputs.shape[1] > run.spec.length:
            longer = f" (the run was trained on {run.spec.length:,} tokens)"
        raise ValueError(
            f"{where} of shape {inputs.shape} cannot be answered to{longer}: {problem}"
            f"{longer and cure}"
        ) from problem


def parse_times(text: str) -> tuple[int, ...]:
    """Multiples of the training length, such as "1,2,4,8"; `ValueError` for others."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(
            f"--lengths must be whole numbers from 1, such as 1,2,4,8, got {text!r}"
        )
    return tuple(map(int, words))


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The flag --trust, which every command that reads a run has."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import, and so execute, the run's layers and data set that are not of "
        "this project",
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.evaluate")
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    parser.add_argument("--examples", type=int, help="only the first; default: all")
    parser.add_argument("--lengths", help="multiples of the training length")
    parser.add_argument(
        "--chunk", type=int, help="tokens at once; default: as in training"
    )
    parser.add_argument("--data", help="another file, or folder, to score on")
    add_trust(parser)
    options = parser.parse_args(argv)
    try:
        workdir = settings.place("--workdir", options.workdir)
        if options.data is not None and options.lengths is not None:
            raise ValueError("--lengths must go without --data, whose lengths it has")
        run = runs.load_run(workdir, options.step, options.trust)
        if options.lengths is not None:
            times = parse_times(options.lengths)
            at_lengths(
                run, workdir, options.split, times, options.examples, options.chunk
            )
            return 0
        if options.data is not None:
            run = on_file(run, options.data)
        if options.examples is not None:
            run = run.on(run.dataset.shortened(options.examples))
        found = scores(run, options.split, options.chunk)
        if options.chunk is None and not run.config.train.chunk:
            batch = next(iter(run.dataset.evaluation(options.split, 16)))
            batch = jax.tree.map(np.asarray, batch)
            gap = compare_modes(run.model, run.variables, batch)
            found["parallel_vs_recurrent"] = gap
    except PROBLEMS as problem:
        parser.error(str(problem))
    found = {"step": run.step, "split": options.split, **found}
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
