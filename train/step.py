"""One update and one evaluation, as pure functions of state and batch."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from ssm.sequence import Sequence
from train import sharding
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
    accumulate = config["train"]["accumulate"]
    skips = config["train"]["skip_nonfinite"] > 0
    mesh = None if places is None else places.step.mesh
    sums = make_sums(model, loss_fn, padded)

    def gradient(params, collections, batch, key):
        grads, rest = jax.grad(sums, has_aux=True)(params, collections, batch, key)
        if mesh is not None and mesh.size > 1:
            # Else a sum of them could be whole on every device.
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        return grads, rest

    def accumulated(params, collections, batch, key):
        def add(carry, part):
            batch, index = part
            grads, (totals, collections) = gradient(
                params, carry[2], batch, jax.random.fold_in(key, index)
            )
            grads, totals = jax.tree.map(jnp.add, carry[:2], (grads, totals))
            return (grads, totals, collections), None

        parts = jax.tree.map(lambda x: _cut(x, accumulate), dict(batch))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, params, collections, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        carry = (zeros[0], zeros[1][0], collections)
        carry, _ = jax.lax.scan(add, carry, (parts, jnp.arange(accumulate)))
        return carry[0], carry[1:]

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = gradient if accumulate == 1 else accumulated
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
        loss, weight, metrics = loss_fn(outputs, batch)
        return loss, ({"loss": loss, "weight": weight, **metrics}, collections)

    return sums


def make_eval_step(
    model: nn.Module, loss_fn: LossFn, padded: bool = True, mesh: Mesh | None = None
) -> Callable[[Mapping, Mapping], dict[str, jax.Array]]:
    """The jitted (variables, batch) -> sums "loss", "weight" and those of `loss_fn`,
    for batches on `mesh`."""

    def eval_step(variables, batch):
        with sharding.context(mesh):
            outputs, _ = model.apply(
                variables, batch["inputs"], sequence=sequence_of(batch, padded)
            )
        loss, weight, metrics = loss_fn(outputs, batch)
        return {"loss": loss, "weight": weight, **metrics}

    return jax.jit(eval_step)


def mean_scores(
    eval_step: Callable, variables: Mapping, batches: Iterable[Mapping], mesh: Mesh
) -> dict[str, float]:
    """Means over all examples of `batches`; padding examples do not count.

    Raises:
        ValueError: no example has a target that counts.
    """
    totals = before = None
    for batch in batches:
        jax.block_until_ready(before)  # two batches are on their way, no more
        sums = eval_step(variables, sharding.place(batch, mesh))
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


def _cut(x, parts: int):
    """[B, ...] -> [parts, B / parts, ...]; parts share the rows of every device."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _means(totals: Mapping) -> dict:
    weight = jnp.maximum(totals["weight"], 1)
    return {k: v / weight for k, v in totals.items() if k != "weight"}
