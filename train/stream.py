"""Sequences longer than memory: a model over pieces of them, its state carried on.

What one call over the whole would give, up to rounding, in the memory of a piece.
`train.evaluate`, `train.generate` and `train.predict` read so with --chunk, and a run
with `train.chunk` is evaluated so.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from layers.facts import has_state, why_no_state
from layers.models.model import Model
from train import losses, settings, sharding, step
from train.losses import LossFn

CHUNK = 2**16  # tokens of a piece, where nothing else is said
ENCODERS = ("scalar", "token")  # whose inputs are [B, L, ...]
ALONG = ("inputs", "mask", "reset", "dt")  # what is cut, besides targets per token
Advance = Callable[[int], None]


def unheard(tokens: int) -> None:
    """An `Advance` that shows nothing."""


def check(key: str, chunk: int, model: nn.Module) -> None:
    """Raises a `ValueError` that begins with `key` where `chunk` is no number of tokens
    or `model` cannot read a sequence in pieces."""
    settings.check(key, chunk, 1)
    if chunk < 1:
        raise ValueError(f"{key} must be 1 or more tokens, got {chunk}")
    reason = ""
    if not isinstance(model, Model):
        reason = f"got {type(model).__name__}, of another kind"
    elif model.encoder not in ENCODERS:
        reason = f"got the encoder {model.encoder!r}, whose inputs cannot be cut"
    elif model.head == "retrieval":
        reason = "got the head 'retrieval', which compares two"
    elif not has_state(model):
        reason = f"got one without a recurrent mode: {why_no_state(model)}"
    if reason:
        raise ValueError(
            f"{key} must be for a model that reads one sequence of tokens or numbers "
            f"and has a state, {reason}"
        )


def pieces(arrays: Mapping[str, np.ndarray], chunk: int) -> Iterator[dict]:
    """Arrays [B, L, ...] as pieces of `chunk` tokens, or of L where that is less.

    Where `chunk` does not divide L the last piece is filled with masked tokens, and all
    have a mask, so that one program serves. A reset behind the last real token of a row
    is left out: it would be of a token that does not come, and take from the state what
    a pooled head answers with.

    Args:
        arrays: "inputs", and where there are "mask", "reset", "dt" [B, L] and others.
        chunk: tokens of a piece, 1 or more.
    """
    arrays = dict(arrays)
    rows, length = arrays["inputs"].shape[:2]
    chunk = min(chunk, length)
    if length % chunk and "mask" not in arrays:
        arrays["mask"] = np.ones((rows, length), bool)
    if "reset" in arrays and "mask" in arrays:
        mask = arrays["mask"]
        last = np.where(mask.any(1), length - 1 - mask[:, ::-1].argmax(1), -1)
        arrays["reset"] = arrays["reset"] & (np.arange(length) <= last[:, None])
    for at in range(0, length, chunk):
        piece = {name: x[:, at : at + chunk] for name, x in arrays.items()}
        short = chunk - piece["inputs"].shape[1]
        if short:
            piece = {name: _filled(name, x, short) for name, x in piece.items()}
        yield piece


def _filled(name, x, short):
    """With `short` tokens more, which are masked; a time may not be 0."""
    widths = [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, widths, constant_values=1 if name == "dt" else 0)


def over(
    call: Callable[[dict, Any], tuple[Any, Any]],
    state: Any,
    arrays: Mapping[str, np.ndarray],
    chunk: int,
    advance: Advance = unheard,
) -> Iterator[tuple[Any, Any]]:
    """What `call` finds in one piece after another, and the state behind it.

    Args:
        call: (piece, state) -> what it finds, the state behind the piece. Two pieces
            are on their way at once, no more.
        state: before the first piece; a call may use it up.
        arrays: see `pieces`.
        chunk: tokens of a piece.
        advance: is told the tokens of every piece that is done.
    """
    before = None
    for piece in pieces(arrays, chunk):
        found, state = call(piece, state)
        jax.block_until_ready(before)
        yield found, state
        before = found
        advance(math.prod(piece["inputs"].shape[:2]))


def make_eval_step(
    model: nn.Module,
    loss_fn: LossFn,
    padded: bool,
    mesh: Mesh,
    chunk: int,
    advance: Advance = unheard,
) -> Callable[[Mapping, Mapping], dict[str, jax.Array]]:
    """(variables, batch on the host) -> the sums of `step.make_eval_step`, the batch
    read in pieces of `chunk` tokens.

    Where the model answers at every token, the sums of all pieces; else those of the
    answer behind the last one.

    Args:
        model: one that `check` lets pass.
        loss_fn: (outputs, batch) -> (loss_sum, weight, metric_sums).
        padded: whether real examples may have masked tokens.
        mesh: the devices, over which rows are spread.
        chunk: tokens of a piece.
        advance: is told the tokens of every piece that is done.
    """
    per_token = model.head == "token"

    def read_piece(masked, variables, state, piece):
        with sharding.context(mesh):
            outputs, state = model.apply(
                variables, piece["inputs"], state, step.sequence_of(piece, masked)
            )
        if not per_token:
            return outputs, state
        return losses.totals(losses.by_row(loss_fn), outputs, piece), state

    @jax.jit
    def pooled(outputs, batch):
        return losses.totals(loss_fn, outputs, batch)

    compiled = {}

    def started(rows, masked):
        """The state before the first token, and the call, by the rows of a batch."""
        if (rows, masked) not in compiled:
            places = sharding.of_state(model.init_state, rows, mesh)
            start = jax.jit(lambda: model.init_state(rows), out_shardings=places)
            read = jax.jit(
                functools.partial(read_piece, masked),
                out_shardings=(None, places),
                donate_argnums=1,
            )
            compiled[rows, masked] = start, read
        return compiled[rows, masked]

    def eval_step(variables, batch):
        variables = jax.tree.map(jnp.asarray, variables)  # to the devices, once
        own, length = batch["mask"].shape
        rows = sharding.batch_rows(mesh, own)
        masked = padded or length % min(chunk, length) > 0
        start, read = started(rows, masked)
        along = {*ALONG, "targets"} if per_token else ALONG
        arrays = {name: x for name, x in batch.items() if name in along}

        def one(piece, state):
            return read(variables, state, sharding.place(piece, mesh))

        found, totals = None, None
        for found, _ in over(one, start(), arrays, chunk, advance):
            if per_token:
                totals = found if totals is None else _added(totals, found)
        if per_token:
            return losses.joined(totals)
        rest = {name: x for name, x in batch.items() if name not in ALONG}
        rest["mask"] = batch["mask"].any(axis=1, keepdims=True)
        return pooled(found, sharding.place(rest, mesh))

    return eval_step


@jax.jit
def _added(totals, found):
    return jax.tree.map(jnp.add, totals, found)


@contextlib.contextmanager
def bar(what: str, pieces: int, shown: bool = True) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal, with the pieces done and
    tokens a second: (tokens) -> None tells it of another piece.

    Args:
        what: is done.
        pieces: that there are.
        shown: False for none, such as where the terminal shows what is made.
    """
    if not (shown and sys.stderr.isatty()):
        yield unheard
        return
    shown_bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed there is a command's answer
        redirect_stderr=False,
    )
    with shown_bar:
        task, start, done = (
            shown_bar.add_task("", total=pieces, rate=""),
            time.monotonic(),
            0,
        )

        def advance(tokens):
            nonlocal done
            done += tokens
            rate = done / max(time.monotonic() - start, 1e-9)
            shown_bar.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

        yield advance
