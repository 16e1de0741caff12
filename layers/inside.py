"""What goes on inside a layer, shown where a collection is asked for: the arrays that
its mixing acts on, and for the flight recorder a few scalars."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.parameters import at_least_float32
from ssm import sequence as seq

EXPOSED = "intermediates"  # what `expose` shows,
MOVED = "perturbations"  # and what is added to it
RECORD = "record"  # the collection of the flight recorder
SATURATED = 0.01  # a gate below this, or above 1 - this, hardly passes a gradient


def expose(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """`value`, made visible to `materialize`: "values" is what the mixing acts on,
    "mixed" its direct result."""
    module.sow(EXPOSED, name, value)
    if module.has_variable(MOVED, name):
        value = value + module.get_variable(MOVED, name)
    return value


def record(module: nn.Module, sequence: seq.Sequence, **quantities: Any) -> None:
    """Keeps scalars of what goes on inside, where the collection is asked for.

    dt: the range of the steps of existing tokens; log_decay [B, L, ...]: the range of
    its sum over the call, how much is forgotten; gate: the share of saturated ones, of
    values in [0, 1]; anything else, arrays [B, L, ...] and the tree "state": its root
    mean square. None is left out. NaN where one is inside.
    """
    if not module.is_mutable_collection(RECORD) or module.is_initializing():
        return
    for name, value in quantities.items():
        if value is None:
            continue
        for key, scalar in _summary(name, value, sequence):
            scalar = jax.lax.stop_gradient(scalar).astype(jnp.float32)
            module.put_variable(RECORD, key, scalar)


def _summary(name, value, sequence):
    """Pairs of a name and a scalar."""
    if name == "state":
        leaves = [
            x for x in jax.tree.leaves(value) if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        square = sum(jnp.sum(jnp.square(jnp.abs(x))) for x in leaves)
        yield "state_rms", jnp.sqrt(square / max(1, sum(x.size for x in leaves)))
        return
    value = value.astype(at_least_float32(value.dtype))
    if name == "dt":
        yield "dt_min", jnp.min(_existing(value, sequence, jnp.inf))
        yield "dt_max", jnp.max(_existing(value, sequence, -jnp.inf))
    elif name == "log_decay":
        total = jnp.sum(seq.zero_masked(value, sequence), axis=1)
        yield "log_decay_min", jnp.min(total)
        yield "log_decay_max", jnp.max(total)
    elif name == "gate":
        extreme = jnp.abs(value - 0.5) > 0.5 - SATURATED
        share = jnp.where(jnp.isnan(value), value, extreme)
        yield "gate_saturated", _mean(share, sequence)
    else:
        yield f"{name}_rms", jnp.sqrt(_mean(jnp.square(jnp.abs(value)), sequence))


def _existing(value, sequence, instead):
    if sequence.mask is None:
        return value
    mask = sequence.mask.reshape(*sequence.mask.shape, *[1] * (value.ndim - 2))
    return jnp.where(mask, value, instead)


def _mean(value, sequence):
    """Of existing tokens."""
    if sequence.mask is None:
        return jnp.mean(value)
    share = jnp.mean(sequence.mask.astype(value.dtype))
    return jnp.mean(seq.zero_masked(value, sequence)) / jnp.maximum(share, 1e-9)
