"""Arguments of sums over nodes: arrays [*E, *H, M] beside nodes [*H, N].

The axes *H belong to the nodes; an array may have axes *E before them, several sets of
coefficients over the same nodes. Backends get them flat: [E, G, M] and [G, N].
"""

import math

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import shards


def check(op, name, array, letters, nodes_name, nodes):
    """A `ValueError` unless nodes are [*H, N >= 1] and the array is [*E, *H, M]."""
    if nodes.ndim < 1 or nodes.shape[-1] < 1:
        raise ValueError(
            f"{op}: {nodes_name} must be [*H, N] with N >= 1, got {nodes.shape}"
        )
    groups = nodes.shape[:-1]
    axes = array.shape[:-1] if array.ndim else None
    if (
        axes is None
        or len(axes) < len(groups)
        or axes[len(axes) - len(groups) :] != groups
    ):
        raise ValueError(
            f"{op}: {name} must be {letters} with *H = {groups} as in {nodes_name}, "
            f"got {array.shape}"
        )


def check_count(op, name, array, nodes_name, nodes):
    """A `ValueError` unless the array has one entry per node in its last axis."""
    if array.shape[-1] != nodes.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have the N of {nodes_name} = {nodes.shape[-1]}, "
            f"got {array.shape[-1]}"
        )


def spec(array, nodes):
    """Of an array [*E, *H, M] on several devices: the last axis of *H is channels."""
    if nodes.ndim < 2:
        return shards.WHOLE
    return PartitionSpec(*[None] * (array.ndim - 2), shards.SPREAD)


def promote(*arrays):
    """The arrays in one dtype, float32 or wider, complex if any of them is."""
    dtype = jnp.float32
    for array in arrays:
        dtype = jnp.promote_types(dtype, array.real.dtype)
    if any(jnp.iscomplexobj(array) for array in arrays):
        dtype = jnp.promote_types(dtype, jnp.complex64)
    return tuple(array.astype(dtype) for array in arrays)


def flat(array, nodes):
    """[*E, *H, M] -> [E, G, M]."""
    extra = array.ndim - nodes.ndim
    groups = nodes.shape[:-1]
    leading = math.prod(array.shape[:extra])
    return array.reshape(leading, math.prod(groups), array.shape[-1])


def flat_nodes(nodes):
    """[*H, N] -> [G, N]."""
    return nodes.reshape(math.prod(nodes.shape[:-1]), nodes.shape[-1])
