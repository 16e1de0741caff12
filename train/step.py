"""One update and one evaluation, as pure functions of state and batch."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from ssm.sequence import Sequence
from train import losses, sharding
from train.losses import LossFn
from train.state import TrainState

# What of a step is not finite where `train.skip_nonfinite` has it skipped.
DECISIVE = ("loss", "grad_norm")


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    config: Mapping,
    padded: bool = True,
    places: TrainState | None = None,
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted (state, batch) -> (state, metrics); the given state is used up.

    The gradient is that of sum(loss) / sum(weight) over the whole batch. Over
    `train.accumulate` micro-batches it is the same number, with less memory: only batch
    statistics and dropout see that the batch was cut. The random numbers of step n are
    those of fold_in(key(seed), n).

    With `train.chunk` = n > 0 every sequence is read n tokens at a time, each piece
    with the state that those before it left. The loss is that of the whole; its
    gradient is cut at the borders of the pieces, as if the state that enters were a
    number (truncated backpropagation through time), so that only one piece's
    activations are in memory. Batch statistics and dropout see the pieces.

    With `train.ema` = d > 0 the averaged weights follow as d * ema + (1 - d) * params,
    where d grows from 0.1 as (1 + n) / (10 + n) until it is `train.ema`: the first
    weights are soon forgotten.

    With `train.skip_nonfinite` > 0 a step whose loss or gradient norm (DECISIVE) is not
    finite changes nothing of the state but its step count, bit by bit. The schedule of
    the learning rate, which counts updates, does not move either.

    Args:
        model: obeys the contract of `layers.models.build.build`.
        optimizer: one transformation for all parameters.
        loss_fn: (outputs, batch) -> (loss_sum, weight, metric_sums).
        config: the run's, of which "seed" and "train" are read.
        padded: whether real examples may have masked tokens. Without any, the model is
            spared the mask; padding examples have no weight in the loss either way.
        places: the sharding of every array of the state, before and after, and so of
            the gradients; None leaves it to the compiler, on one device.

    Returns:
        The step. Its metrics are the means "loss", those of `loss_fn`, "grad_norm",
        before clipping, and "weight", what the means are over: they are 0 if it is.
    """
    seed, decay = config["seed"], config["train"]["ema"]
    accumulate, chunk = config["train"]["accumulate"], config["train"]["chunk"]
    skips = config["train"]["skip_nonfinite"] > 0
    mesh = None if places is None else places.step.mesh
    make = make_piece_sums if chunk else make_sums
    sums = make(model, loss_fn, padded)

    def gradient(params, carried, batch, key):
        grads, rest = jax.grad(sums, has_aux=True)(params, carried, batch, key)
        if mesh is not None and mesh.size > 1:
            # Else a sum of them could be whole on every device.
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        return grads, rest

    whole = in_pieces(gradient, model, mesh, chunk) if chunk else gradient

    def accumulated(params, collections, batch, key):
        parts = jax.tree.map(lambda x: _cut(x, accumulate), dict(batch))
        return _in_turn(whole, params, collections, parts, key)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = whole if accumulate == 1 else accumulated
        with sharding.context(mesh):
            grads, (totals, collections) = compute(
                state.params, state.collections(), batch, key
            )
        metrics = _means(totals)
        weight = totals["weight"]
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, ema, 1 - d)
        after = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            **collections,
        )
        metrics |= {"grad_norm": optax.tree.norm(grads), "weight": weight}
        if skips:
            good = jnp.isfinite(jnp.stack([metrics[name] for name in DECISIVE])).all()
            chosen = jax.tree.map(lambda x, y: jnp.where(good, x, y), after, state)
            after = chosen.replace(step=after.step)
        return after, metrics

    out_shardings = None if places is None else (places, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def make_sums(model: nn.Module, loss_fn: LossFn, padded: bool = True) -> Callable:
    """What a training step differentiates: (params, collections, batch, key) -> the sum
    of the loss, and beside it (all sums, the new collections)."""

    def sums(params, collections, batch, key):
        (outputs, _), collections = model.apply(
            {"params": params, **collections},
            batch["inputs"],
            sequence=sequence_of(batch, padded),
            train=True,
            rngs={"dropout": key},
            mutable=list(collections),
        )
        totals = losses.totals(loss_fn, outputs, batch)
        return totals["loss"], (totals, collections)

    return sums


def in_pieces(
    gradient: Callable, model: nn.Module, mesh: Mesh | None, chunk: int
) -> Callable:
    """The gradient of a batch whose sequences are read in pieces of `chunk` tokens,
    which must divide their length: (params, collections, batch, key) -> grads, (all
    sums, the new collections).

    Args:
        gradient: of the piece sums of `make_piece_sums`, and beside it what they have.
        model: with a recurrent mode.
        mesh: the devices; None for one.
        chunk: tokens.
    """

    def of_batch(params, collections, batch, key):
        size = len(batch["mask"])

        def keep(state):
            return sharding.keep_rows(model.init_state, mesh, size, state)

        def behind(params, carried, piece, key):
            grads, (rows, (collections, state)) = gradient(params, carried, piece, key)
            return grads, (rows, (collections, keep(state)))

        pieces = jax.tree.map(lambda x: _pieces(x, chunk), dict(batch))
        carried = collections, keep(model.init_state(size))
        grads, (rows, (collections, _)) = _in_turn(behind, params, carried, pieces, key)
        return grads, (losses.joined(rows), collections)

    return of_batch


def make_piece_sums(model: nn.Module, loss_fn: LossFn, padded: bool = True) -> Callable:
    """`make_sums` of a piece of every sequence, behind those before it: (params,
    (collections, state), piece, key) -> the sum of the loss, and beside it (all sums of
    every row [B], see `losses.by_row`, the new collections and state)."""
    loss_fn = losses.by_row(loss_fn)

    def sums(params, carried, piece, key):
        collections, state = carried
        (outputs, after), collections = model.apply(
            {"params": params, **collections},
            piece["inputs"],
            state,
            sequence_of(piece, padded),
            train=True,
            rngs={"dropout": key},
            mutable=list(collections),
        )
        rows = losses.totals(loss_fn, outputs, piece)
        return jnp.sum(rows["loss"]), (rows, (collections, after))

    return sums


def make_eval_step(
    model: nn.Module, loss_fn: LossFn, padded: bool = True, mesh: Mesh | None = None
) -> Callable[[Mapping, Mapping], dict[str, jax.Array]]:
    """(variables, batch) -> sums "loss", "weight" and those of `loss_fn`, computed on
    `mesh`, where the batch is put unless it is there."""

    @jax.jit
    def sums(variables, batch):
        with sharding.context(mesh):
            outputs, _ = model.apply(
                variables, batch["inputs"], sequence=sequence_of(batch, padded)
            )
        return losses.totals(loss_fn, outputs, batch)

    def eval_step(variables, batch):
        return sums(variables, batch if mesh is None else sharding.place(batch, mesh))

    return eval_step


def mean_scores(
    eval_step: Callable, variables: Mapping, batches: Iterable[Mapping]
) -> dict[str, float]:
    """Means over all examples of `batches`; padding examples do not count.

    Raises:
        ValueError: no example has a target that counts.
    """
    totals = before = None
    for batch in batches:
        jax.block_until_ready(before)  # two batches are on their way, no more
        sums = eval_step(variables, batch)
        before = totals
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    if float(jax.device_get(totals["weight"])) == 0:
        raise ValueError(
            "the split to evaluate must have a target, got only ignored or masked ones"
        )
    return {name: float(x) for name, x in jax.device_get(_means(totals)).items()}


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether no number of the state is infinite or not a number."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))


def sequence_of(batch: Mapping, padded: bool) -> Sequence:
    """What accompanies the inputs of a batch, without the mask where none is needed."""
    mask = batch["mask"] if padded else None
    return Sequence(mask=mask, reset=batch.get("reset"), dt=batch.get("dt"))


def _in_turn(gradient: Callable, params, carried, parts, key):
    """Gradients and sums of parts of a batch, [n, ...] each, added up one after
    another, and what each carried on to the next: grads, (totals, carried)."""

    def add(before, part):
        part, index = part
        grads, (totals, carried) = gradient(
            params, before[2], part, jax.random.fold_in(key, index)
        )
        grads, totals = jax.tree.map(jnp.add, before[:2], (grads, totals))
        return (grads, totals, carried), None

    count = len(jax.tree.leaves(parts)[0])
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, carried, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (zeros[0], zeros[1][0], carried)
    (grads, totals, carried), _ = jax.lax.scan(add, start, (parts, jnp.arange(count)))
    return grads, (totals, carried)


def _pieces(x, chunk: int):
    """[B, L, ...] -> [L / chunk, B, chunk, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _cut(x, parts: int):
    """[B, ...] -> [parts, B / parts, ...]; parts share the rows of every device."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _means(totals: Mapping) -> dict:
    weight = jnp.maximum(totals["weight"], 1)
    return {k: v / weight for k, v in totals.items() if k != "weight"}
