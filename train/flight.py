"""The flight recorder of a run: a few scalars of every layer, and where it broke.

With `train.record` every log has them; see `layers.inside` for what they are. When a
run ends because something is not finite, its last steps are run again from the last
checkpoint, with the recorder on, and the error names the first quantity that broke.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from layers.inside import RECORD
from train import sharding, signals, step
from train.losses import LossFn
from train.state import named_leaves


class Probe(NamedTuple):
    """What one step looks like from inside, before its update."""

    weights: Mapping  # the largest magnitude of every parameter
    record: Mapping  # the collection RECORD
    loss: jax.Array
    gradients: Mapping  # the norm of every parameter's


def make_probe(
    model: nn.Module,
    loss_fn: LossFn,
    seed: int,
    padded: bool,
    mesh: Mesh | None = None,
    chunk: int = 0,
) -> Callable:
    """The jitted (state, batch) -> `Probe` of the step that would come next, both on
    `mesh`. With `train.chunk` > 0 its record has, over the pieces, the least of what is
    called _min and of the rest the largest."""
    seen = _whole(model, loss_fn, padded)
    if chunk:
        seen = _in_pieces(model, loss_fn, padded, mesh, chunk)

    def probe(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with sharding.context(mesh):
            (loss, record), gradients = seen(
                state.params, state.collections(), batch, key
            )
        weights = jax.tree.map(lambda p: jnp.max(jnp.abs(p)), state.params)
        norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(jnp.square(g))), gradients)
        return Probe(weights, record, loss, norms)

    return jax.jit(probe)


def _whole(model, loss_fn, padded) -> Callable:
    """(params, collections, batch, key) -> (mean loss, record), gradients."""

    def forward(params, collections, batch, key):
        (outputs, _), recorded = model.apply(
            {"params": params, **collections},
            batch["inputs"],
            sequence=step.sequence_of(batch, padded),
            train=True,
            rngs={"dropout": key},
            mutable=[*collections, RECORD],
        )
        loss, weight, _ = loss_fn(outputs, batch)
        return loss / jnp.maximum(weight, 1), recorded.get(RECORD, {})

    return jax.value_and_grad(forward, has_aux=True)


def _in_pieces(model, loss_fn, padded, mesh, chunk) -> Callable:
    """`_whole` of a batch that is read in pieces, with the memory of one."""
    sums = step.make_piece_sums(model, loss_fn, padded)

    def gradient(params, carried, piece, key):
        grads, (rows, (collections, state)) = jax.grad(sums, has_aux=True)(
            params, carried, piece, key
        )
        record = jax.tree_util.tree_map_with_path(
            lambda path, a, b: (jnp.minimum if _least(path) else jnp.maximum)(a, b),
            carried[0][RECORD],
            collections.get(RECORD, {}),
        )
        return grads, (rows, ({**collections, RECORD: record}, state))

    whole = _whole(model, loss_fn, padded)
    compute = step.in_pieces(gradient, model, mesh, chunk)

    def seen(params, collections, batch, key):
        first = jax.tree.map(lambda x: x[:, :chunk], dict(batch))
        (_, record), _ = jax.eval_shape(whole, params, collections, first, key)
        nothing = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full_like(x, jnp.inf if _least(path) else -jnp.inf),
            record,
        )
        grads, (totals, collections) = compute(
            params, {**collections, RECORD: nothing}, batch, key
        )
        weight = jnp.maximum(totals["weight"], 1)
        gradients = jax.tree.map(lambda g: g / weight, grads)
        return (totals["loss"] / weight, collections[RECORD]), gradients

    return seen


def _least(path) -> bool:
    """Whether of two values of a quantity the smaller one tells more."""
    return path[-1].key.endswith("_min")


def quantities(record: Mapping) -> dict[str, float]:
    """The collection RECORD as "block 3: dt_max" -> value, in the order of the blocks.

    Of a model that is not a stack of blocks the names are paths.
    """
    entries = []
    for path, value in named_leaves(jax.device_get(record)):
        match = re.fullmatch(r"stack/(repeated/block|rest)_(\d+)/(.*)", path)
        if match is None:
            entries.append((math.inf, path.replace("/", ": "), float(value.max())))
            continue
        kind, position, name = match[1], int(match[2]), match[3]
        name = name.removeprefix("mixer/").replace("/", " ")
        if kind == "rest":
            entries.append((_repeated(record) + position, name, float(value)))
            continue
        pattern = len(record["stack"]["repeated"])
        for repetition, one in enumerate(value):
            entries.append((repetition * pattern + position, name, float(one)))
    entries.sort(key=lambda entry: entry[0])
    return {
        name if math.isinf(block) else f"block {block + 1}: {name}": value
        for block, name, value in entries
    }


def _repeated(record) -> int:
    """How many blocks lie in the repetitions of the pattern."""
    repeated = record["stack"].get("repeated", {})
    sizes = [leaf.shape[0] for leaf in jax.tree.leaves(repeated)]
    return len(repeated) * (sizes[0] if sizes else 0)


def first_bad(probe: Probe) -> str:
    """The first quantity that is not finite, in the order of the computation, and its
    value; "" if all are."""

    def bad(values):
        return next(((k, v) for k, v in values if not math.isfinite(v)), None)

    def leaves(tree, kind):
        return ((f"{kind} {p}", float(v)) for p, v in named_leaves(tree))

    host = jax.device_get(probe)
    offender = (
        bad(leaves(host.weights, "the parameter"))
        or bad(quantities(host.record).items())
        or bad([("the loss", float(host.loss))])
        or bad(leaves(host.gradients, "the gradient of"))
    )
    if offender is None:
        return ""
    name, value = offender
    return f"{name.replace(': ', ', ')} = {value}"


def find(
    probe: Callable,
    train_step: Callable,
    state,
    batches: Iterator,
    mesh,
    steps: range,
    allowed: int = 0,
    in_a_row: int = 0,
) -> str:
    """Runs `steps` again and says what broke first, and in which of them; "" if nothing
    does.

    Args:
        probe, train_step, state, batches, mesh: of the run, before the first of them.
        steps: their numbers.
        allowed: `train.skip_nonfinite`: what broke in that many steps in a row, and not
            in the next one, is not what ended the run.
        in_a_row: how many steps before the first were skipped.

    Raises:
        Stopped: a signal came.
    """
    cause = ""
    for number in signals.stoppable(steps):
        batch = sharding.place(next(batches), mesh)
        broken = first_bad(probe(state, batch))
        if not broken:
            cause, in_a_row = "", 0
        else:
            cause, in_a_row = cause or f"{broken}, step {number}", in_a_row + 1
        if in_a_row > allowed:
            break
        state, _ = train_step(state, batch)
    return cause
