"""The mixing matrix of a layer that is linear in its values."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.tolerance import error, limit
from layers.inside import EXPOSED, MOVED


def materialize(
    layer: nn.Module, variables: Mapping, x: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The matrix M with mixed[t] = sum_s M[t, s] values[s], in order of time.

    The values are what the layer exposes as such, v of attention or u of Mamba, after
    its projections and before its output gate; of a layer that exposes nothing (S4D)
    they are its input, and mixed is its output. All is computed in float32 or better,
    whatever the layer's dtype.

    Args:
        layer: a mixer, with or without a recurrent mode.
        variables: those that `layer.apply` takes.
        x: [B, L, H]; or a length L, where M does not depend on the input.

    Returns:
        M, values and mixed. With values and mixed [B, L, *C] M is [B, *C, L, L], one
        matrix per channel, or [B, *C_out, *C_in, L, L] where channels mix too (S5,
        fewer heads of keys than of queries). For a length the batch is one random
        input.

    Raises:
        ValueError: the layer is not linear in its values, or `x` is a length and M
            depends on the input.
    """
    if hasattr(layer, "dtype"):
        layer = layer.clone(dtype=jnp.promote_types(layer.dtype, jnp.float32))
    if not isinstance(x, int | np.integer):
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _matrix(layer, variables, x)
    if x < 1:
        raise ValueError(f"x: a length must be at least 1, got {x}")
    token = *getattr(layer, "size", ()), layer.features
    inputs = jax.random.normal(jax.random.key(0), (2, x, *token))
    M, values, mixed = _matrix(layer, variables, inputs)
    if _differ(M[0], M[1]):
        raise ValueError(
            f"x: the matrix of {type(layer).__name__} depends on the input; pass x "
            f"[B, L, {', '.join(map(str, token))}], not the length {x}"
        )
    return M[:1], values[:1], mixed[:1]


def _matrix(layer, variables, x):
    values, respond = _response(layer, variables, x)
    mixed, pull = jax.vjp(respond, jnp.zeros_like(values))
    length, out, into = x.shape[1], mixed.shape[2:], values.shape[2:]
    if out == into:
        # One cotangent for all channels at once: they do not mix.
        rows = _rows(pull, mixed, jnp.ones((1, *out), mixed.dtype))[0]
        M = jnp.moveaxis(rows, (0, 2), (-2, -1))
        if not _differ(_applied(M, values), mixed):
            return M, values, mixed
    units = jnp.eye(int(np.prod(out)), dtype=mixed.dtype).reshape(-1, *out)
    rows = _rows(pull, mixed, units)  # [C_out, L, B, L, *C_in]
    M = jnp.moveaxis(rows, (0, 1, 3), (1, -2, -1))
    M = M.reshape(len(x), *out, *into, length, length)
    if _differ(_contracted(M, values, len(out)), mixed):
        raise ValueError(
            f"layer: {type(layer).__name__} is not linear in its values, so it has no "
            "mixing matrix"
        )
    return M, values, mixed


def _response(layer, variables, x):
    """The values, and what a change of them makes of the result."""
    _, exposed = layer.apply(variables, x, mutable=[EXPOSED])
    if "values" not in exposed.get(EXPOSED, {}):
        return x, lambda change: layer.apply(variables, x + change)[0]

    def respond(change):
        changed = {**variables, MOVED: {"values": change}}
        _, exposed = layer.apply(changed, x, mutable=[EXPOSED])
        return exposed[EXPOSED]["mixed"][0]

    return exposed[EXPOSED]["values"][0], respond


def _rows(pull, mixed, channels):
    """The gradient of mixed[:, t] . c for every t and every c of `channels`:
    [channels, L, B, L, *C_in]."""

    def row(t, c):
        return pull(jnp.zeros_like(mixed).at[:, t].set(c))[0]

    times = jnp.arange(mixed.shape[1])
    return jax.jit(
        lambda: jax.lax.map(lambda c: jax.lax.map(lambda t: row(t, c), times), channels)
    )()


def _applied(M, values):
    """M [B, *C, L, L] on values [B, L, *C]."""
    columns = jnp.moveaxis(values, 1, -1)[..., None]
    return jnp.moveaxis((M @ columns)[..., 0], -1, 1)


def _contracted(M, values, out):
    """M [B, *C_out, *C_in, L, L] on values [B, L, *C_in]."""
    columns = jnp.moveaxis(values, 1, -1)[..., None]
    columns = columns.reshape(len(columns), *[1] * out, *columns.shape[1:])
    product = (M @ columns)[..., 0]
    product = jnp.sum(product, tuple(range(1 + out, product.ndim - 1)))
    return jnp.moveaxis(product, -1, 1)


def _differ(a, b):
    return error(a, b) > limit("float32", "gradient")
