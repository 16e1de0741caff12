"""The suite over streams: what a long sequence takes in pieces, and at once."""

import functools
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from rich.table import Table

from configs import common
from kernels.bench import timing
from layers import build
from train import generate, losses, sharding, state, step, stream

WORDS = 16
LAYERS = ("s5", "mamba")
HEADINGS = ("case", "layer", "tokens", "at once", "seconds", "MB")
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def config_of(layer: str, length: int, chunk: int):
    """Two blocks of 32 features that predict every next token."""
    config = common.base()
    common.set_layer(config, layer)
    config.model.layer_args.state_size = 16
    config.model.update(features=32, depth=2, length=length, head="token")
    config.model.update(encoder="token", vocab_size=WORDS, outputs=WORDS)
    config.train.chunk = chunk
    return config


def batch_of(length: int) -> dict[str, np.ndarray]:
    """One sequence."""
    words = np.random.default_rng(0).integers(0, WORDS, (1, length + 1))
    words = words.astype(np.int32)
    mask = np.ones((1, length), bool)
    return {"inputs": words[:, :-1], "targets": words[:, 1:], "mask": mask}


def evaluate_case(config, length):
    """The scores of one sequence."""
    model, mesh, loss = build(config.model), sharding.rows_mesh(), losses.make("token")
    batch, chunk = batch_of(length), config.train.chunk
    variables = _variables(model)
    whole = step.make_eval_step(model, loss, False, mesh)
    pieces = stream.make_eval_step(model, loss, False, mesh, chunk or length)
    return lambda: (pieces if chunk else whole)(variables, batch)


def generate_case(config, length):
    """So many tokens behind a prompt of one."""
    model, prompt = build(config.model), np.zeros((1, 1), np.int32)
    variables, key = _variables(model), jax.random.key(0)
    made = functools.partial(generate.tokens_in_pieces, chunk=config.train.chunk)
    return lambda: [p[:, -1] for p in made(model, variables, prompt, length, key)]


def train_case(config, length):
    """One update on one sequence."""
    model, mesh, optimizer = build(config.model), sharding.rows_mesh(), optax.adam(1e-3)
    batch = batch_of(length)
    create = state.creator(model, optimizer, batch_of(2), 0, mesh)
    update = step.make_train_step(model, optimizer, losses.make("token"), config, False)
    trained = create()
    return lambda: update(trained, sharding.place(batch, mesh))


CASES = {"evaluate": evaluate_case, "generate": generate_case, "train": train_case}


def _variables(model):
    return jax.jit(functools.partial(state.init_variables, model, batch_of(2)))(
        jax.random.key(0)
    )


def measured(name: str, layer: str, length: int, chunk: int) -> dict:
    """Seconds of the first call, compilation included, and the bytes by which the
    resident set of this process grew at most, what is made before the call included."""
    before = _restart_peak()
    call = CASES[name](config_of(layer, length, chunk), length)
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    return {
        "case": name,
        "layer": layer,
        "length": length,
        "chunk": chunk,
        "seconds": seconds,
        "peak_bytes": _peak() - before,
    }


def _restart_peak() -> int:
    """The bytes resident now, from which on Linux the peak is counted anew."""
    if not REFERENCES.exists():
        return _peak()
    REFERENCES.write_text("5")
    return timing.resident()


def _peak() -> int:
    """Bytes that were resident at most."""
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def suite(options, console) -> dict:
    """Its figures: every case, layer and length in a process of its own, in pieces and,
    of the second length, at once."""
    chunk = 64 if options.small else stream.CHUNK
    lengths = [chunk, 4 * chunk, 16 * chunk]
    table, found = Table(*HEADINGS, title="streams"), []
    for name in CASES:
        for layer in LAYERS[: 1 if options.small else None]:
            for length in lengths:
                pieces = [chunk]
                if name != "generate" and length == lengths[1]:
                    pieces.append(0)
                found += [_alone(name, layer, length, size) for size in pieces]
    for row in found:
        table.add_row(*cells(row))
    console.print(table)
    return {"streams": found}


def cells(row: dict) -> tuple[str, ...]:
    """A row of `measured` in words, under HEADINGS; docs/scale.md has them."""
    size = row["chunk"] or row["length"]
    figures = f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"
    return row["case"], row["layer"], f"{row['length']:,}", f"{size:,}", *figures


def _alone(*arguments) -> dict:
    """A row, measured in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, arguments)
