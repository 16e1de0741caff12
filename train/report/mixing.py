"""The matrix by which a trained layer mixes the tokens of one example: what there is to
see of a layer that is not linear in its inputs, as an impulse among zeros passes none
of its gates."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.tolerance import error, limit
from layers import materialize
from layers.inside import EXPOSED
from ssm.sequence import Sequence
from train import probe, runs
from train.runs import Run

TOKENS = 64  # of the example that are looked at
FEW = 4  # tokens that show whether channels mix too
NUMBERS = 2**24  # of a matrix of matrices


class Mixing(NamedTuple):
    """The matrix of one channel.

    Attributes:
        title: number and layer of the block.
        split: of the example, its first one.
        channel, channels: the place of the channel among all, as (1, 4) among (4, 16).
        matrices: stage -> [L, L].
    """

    title: str
    split: str
    channel: tuple[int, ...]
    channels: tuple[int, ...]
    matrices: dict[str, np.ndarray]


def linear(layer: nn.Module, variables: dict, length: int) -> bool:
    """Whether the layer's answer to a sum of inputs is the sum of its answers, so that
    its impulse responses tell all of it."""
    layer = precise(layer)
    a, b = jax.random.normal(jax.random.key(0), (2, 1, length, layer.features))
    inputs = jnp.concatenate([a, b, a + b, jnp.zeros_like(a)])
    y, _ = jax.jit(layer.apply)(variables, inputs)
    return error(y[0] + y[1] - y[3], y[2]) <= limit("float32", "gradient")


def kinds(run: Run) -> dict[int, int]:
    """Of each layer that is not linear in its inputs, by its number in the pattern
    (from 0), of how many tokens its matrix may be; 0 where it has none."""
    stack, sizes = run.model.stack(), {}
    if run.model.encoder == "grid":
        return sizes  # places of a grid have no one order
    for number, make in enumerate(stack.pattern[: stack.depth]):
        layer = precise(make().mixer())
        variables = probe.mixer_variables(run.variables, stack, number)
        if linear(layer, variables, min(TOKENS, run.spec.length)):
            continue
        x = jax.random.normal(jax.random.key(0), (1, FEW, layer.features))
        try:
            small, *_ = materialize(layer, variables, x)
        except ValueError:  # not linear in anything that it shows
            sizes[number] = 0
            continue
        most = math.isqrt(NUMBERS // math.prod(small.shape[:-2]))
        sizes[number] = min(TOKENS, most)
    return sizes


def of(run: Run, stages: dict[str, dict], kinds: dict[int, int]) -> list[Mixing]:
    """The matrices of `kinds` on one example, one for each class of layers that has
    them.

    Args:
        run: of a `Model`.
        stages: name -> variables of the model, the trained ones last.
        kinds: of the run.
    """
    split = runs.last_split(run.dataset)
    batch = next(iter(run.dataset.evaluation(split, 1)))
    stack, trained, mixings = run.model.stack(), [*stages][-1], {}
    for number, count in kinds.items():
        layer = precise(stack.pattern[number]().mixer())
        name = type(layer).__name__
        if name in mixings or not count:
            continue
        inputs_of = _reader(run, batch, number)
        matrices = {}
        for stage, variables in stages.items():
            weights = probe.mixer_variables(variables, stack, number)
            M, *_ = materialize(layer, weights, inputs_of(variables)[:, :count])
            matrices[stage] = np.asarray(M[0])
        sums = np.abs(np.tril(matrices[trained], -1)).sum(axis=(-1, -2))
        channel = tuple(map(int, np.unravel_index(sums.argmax(), sums.shape)))
        mixings[name] = Mixing(
            f"block {number + 1}, {name}",
            split,
            channel,
            sums.shape,
            {stage: M[channel] for stage, M in matrices.items()},
        )
    return [*mixings.values()]


def precise(layer: nn.Module) -> nn.Module:
    """The layer with activations of float32 at least."""
    if not hasattr(layer, "dtype"):
        return layer
    return layer.clone(dtype=jnp.promote_types(layer.dtype, jnp.float32))


def _reader(run: Run, batch: dict, number: int):
    """(variables of the model) -> the inputs [1, L, H] of a block's mixer when the
    model reads the example, without padding."""
    stack, spec = run.model.stack(), run.spec
    kind = type(stack.pattern[number]().mixer())
    mask = batch["mask"] if spec.padded else None
    sequence = Sequence(mask, batch.get("reset"), batch.get("dt"))

    def record(call, args, kwargs, context):
        module = context.module
        is_mixer = module.name == "mixer" and isinstance(module, kind)
        if is_mixer and context.method_name == "__call__":
            module.sow(EXPOSED, "entered", args[0])
        return call(*args, **kwargs)

    @jax.jit
    def exposed(variables):
        with nn.intercept_methods(record):
            _, collections = run.model.apply(
                variables, batch["inputs"], sequence=sequence, mutable=[EXPOSED]
            )
        return collections

    # The model has moved real tokens to the front.
    real = int(batch["mask"].reshape(-1, batch["mask"].shape[-1])[0].sum())

    def read(variables):
        values = probe.mixer_variables(exposed(variables), stack, number)[EXPOSED]
        return values["entered"][0][:1, : max(1, real)]

    return read
