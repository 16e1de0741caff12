"""State-space models over images: ConvSSM (https://arxiv.org/abs/2310.19694).

    X[t] = a X[t-1] + gain B * U[t]      [B, h, w, P] complex
    Y[t] = Re(C * X[t])                  [B, h, w, U]

* is a two-dimensional cross-correlation that keeps the size, zero outside. The state
kernel is 1 x 1 and diagonal, a vector a [P]: then two steps compose to one of the same
cost, and the scan over time is associative at O(1) per element. With 1 x 1 kernels B
and C every pixel is a `recurrence.mixed` of its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kernels.varying import together
from ssm import recurrence
from ssm.chunks import bound

CHUNK = 16  # frames whose states [h, w, P] exist at once


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The cross-correlation of x [..., h, w, I] with kernel [k, k, I, O], zero outside:
    [..., h, w, O]; of every axis each `stride`-th pixel."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    images, kernel = together(x.reshape(-1, *x.shape[-3:]), kernel)
    images, kernel = images.astype(dtype), kernel.astype(dtype)
    if stride == 1:
        y = _correlate(images, kernel)
    else:
        y = _plain(images, kernel, stride=stride)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def _plain(images, kernel, padding="SAME", stride=1):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def _correlate(images, kernel):
    """images [n, h, w, I] * kernel [k, k, I, O] -> [n, h, w, O]."""
    return _plain(images, kernel)


def _forward(images, kernel):
    return _plain(images, kernel), (images, kernel)


def _backward(saved, dy):
    # Inside of a loop XLA's own gradients have no fast form on a CPU: up to 20 times
    # the time of these, which are a convolution and k products.
    return jax.lax.platform_dependent(
        *saved, dy, cpu=_gradients, default=_xla_gradients
    )


def _xla_gradients(images, kernel, dy):
    _, pull = jax.vjp(_plain, images, kernel)
    return pull(dy)


def _gradients(images, kernel, dy):
    k, _, I, O = kernel.shape
    low, high = (k - 1) // 2, k // 2
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dimages = _plain(dy, turned, [(high, low)] * 2)
    h, w = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (low, high), (low, high), (0, 0)))
    # The k taps of a row side by side: one product for each row of the kernel.
    taps = jnp.concatenate([padded[:, :, j : j + w] for j in range(k)], axis=-1)
    rows = [
        jnp.matmul(
            taps[:, i : i + h].reshape(-1, k * I).T,
            dy.reshape(-1, O),
            preferred_element_type=jnp.promote_types(kernel.dtype, jnp.float32),
        )
        for i in range(k)
    ]
    dkernel = jnp.stack(rows).reshape(k, k, I, O)
    return dimages, dkernel.astype(kernel.dtype)


_correlate.defvjp(_forward, _backward)


def convolved(
    rule: Callable[..., tuple[jax.Array, jax.Array]],
    B: jax.Array,
    C: jax.Array,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    readout: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The equations above, parallel in time inside of chunks; a call of one frame is a
    step. Only u and the states between chunks are kept for the backward pass.

    Args:
        rule: rule(None) -> (log_a, gain) [P] for regular frames; rule(elapsed
            [B, T, 1, 1, 1]) -> [B, T, 1, 1, P] for elapsed times.
        B, C: [k, k, U, P] and [k, k, P, U] complex.
        u: [B, L, h, w, U], zero where masked.
        state: [B, h, w, P] complex or None; elapsed, reset: [B, L] or None.
        readout: (y, u) -> y, what is made of every frame and its input; None: y.
        chunk: frames per chunk.

    Returns:
        y [B, L, h, w, U] and the final state [B, h, w, P].
    """
    if state is None:
        dtype = jnp.promote_types(u.dtype, B.dtype)
        state = jnp.zeros((u.shape[0], *u.shape[2:4], B.shape[-1]), dtype)
    into = jnp.concatenate([B.real, B.imag], axis=-1)
    out = jnp.concatenate([C.real, -C.imag], axis=-2)

    readout = None if readout is None else bound(readout)
    return recurrence.driven(
        rule,
        Partial(_convolved_with, into),
        Partial(_observed, out, readout),
        u,
        state,
        elapsed,
        reset,
        reverse=False,
        chunk=chunk,
    )


def _convolved_with(kernel, u):
    return convolve(u, kernel)


def _observed(kernel, readout, h, u):
    y = convolve(h, kernel)
    return y if readout is None else readout(y, u)
