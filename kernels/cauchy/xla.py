"""Blocks of frequencies, one reciprocal per pair and frequency, and a real matmul.

With z = x + iy, w = i mu and the numerators over their common denominator,

    v / (w - s z) + conj(v) / (w - s conj(z)) = (2i mu Re(v) - 2 s Re(v conj(z))) r,
    1 / r = s^2 |z|^2 - mu^2 - 2i mu s x,

so that all numerators share the complex r [n, F], and the sum over n is a matmul of the
real coefficients Re(v conj(z)) and Re(v) with its two parts. r lives for one block of
frequencies; the gradient makes it again.

Near a resonance r is large and its sum cancels: the matmul is of full precision, where
accelerators by default round its factors to ten bits or fewer.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.cauchy import reference

BLOCK = 128  # frequencies whose reciprocals exist at once


def unsupported(*arguments) -> str | None:
    return None


def cauchy(v, z, length):
    """v [E, G, n], z [G, n], pairs -> pair [E, G, length // 2 + 1]."""
    (v_re, v_im), (x, y) = v, z
    coefficients = jnp.stack([v_re * x + v_im * y, v_re])  # [2, E, G, n]
    coefficients = coefficients.transpose(2, 0, 1, 3).reshape(
        x.shape[0], -1, x.shape[1]
    )
    sums = _sums(length, coefficients, jnp.hypot(x, y), x)
    return tuple(sums)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.default_matmul_precision("highest")
def _sums(length, coefficients, size, x):
    """coefficients [G, 2E, n], size = |z| and x [G, n] -> [2, E, G, F] real."""

    def block(points):
        s, mu = points
        r = jnp.concatenate(_reciprocal(s, mu, size, x), -1)
        a, b = jnp.split(coefficients @ r, 2, axis=1)  # [G, E, 2 F]
        (a_re, a_im), (b_re, b_im) = (jnp.split(part, 2, -1) for part in (a, b))
        return jnp.stack(
            [-2 * (s * a_re + mu * b_im), 2 * (mu * b_re - s * a_im)]
        ).swapaxes(1, 2)

    sums = jax.lax.map(block, _points(length, x.dtype))  # [blocks, 2, E, G, BLOCK]
    return _joined(sums)[..., : length // 2 + 1]


def _forward(length, coefficients, size, x):
    return _sums(length, coefficients, size, x), (coefficients, size, x)


# Of k = -2 (s a_re + mu b_im) + 2i (mu b_re - s a_im), where (a, b) = coefficients r,
# r = 1 / q and q = s^2 size^2 - mu^2 - 2i mu s x, on pairs (re, im):
#     da = -2 s (dk_re, dk_im)               db = 2 mu (dk_im, -dk_re)
#     dcoefficients = sum_f (da, db) r       dr = coefficients^T (da, db)
#     dq = -conj(r^2) dr
#     dsize = 2 size sum_f s^2 dq_re         dx = -2 sum_f mu s dq_im
@jax.default_matmul_precision("highest")
def _backward(length, saved, cotangent):
    """cotangent [2, E, G, F]; the steps of `block` in reverse, block by block."""
    coefficients, size, x = saved
    points = _points(length, x.dtype)
    extra = points[0].size - cotangent.shape[-1]
    cotangent = jnp.pad(cotangent, ((0, 0),) * 3 + ((0, extra),))
    cotangent = cotangent.reshape(*cotangent.shape[:3], -1, points[0].shape[1])

    def add(totals, block):
        (s, mu), d = block
        d_re, d_im = d.swapaxes(1, 2)  # [G, E, F]
        d_a = jnp.concatenate([-2 * s * d_re, -2 * s * d_im], -1)
        d_b = jnp.concatenate([2 * mu * d_im, -2 * mu * d_re], -1)
        d_sums = jnp.concatenate([d_a, d_b], 1)  # [G, 2E, 2 F]
        re, im = _reciprocal(s, mu, size, x)
        d_coefficients = jnp.einsum(
            "gkf,gnf->gkn", d_sums, jnp.concatenate([re, im], -1)
        )
        dr_re, dr_im = jnp.split(
            jnp.einsum("gkn,gkf->gnf", coefficients, d_sums), 2, axis=-1
        )
        # d(1 / q) = -r^2 dq on pairs
        square, cross = re * re - im * im, 2 * re * im
        dq_re = -square * dr_re - cross * dr_im
        dq_im = cross * dr_re - square * dr_im
        d_size = 2 * size * jnp.sum(s * s * dq_re, -1)
        d_x = -2 * jnp.sum(mu * s * dq_im, -1)
        gradients = (d_coefficients, d_size, d_x)
        return jax.tree.map(jnp.add, totals, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, saved)
    blocks = (points, jnp.moveaxis(cotangent, 3, 0))
    return jax.lax.scan(add, zeros, blocks)[0]


_sums.defvjp(_forward, _backward)


def _reciprocal(s, mu, size, x):
    """r as a pair [G, n, F]; the difference of squares as a product, which stays
    accurate where they nearly cancel (at a resonance)."""
    size, x = size[..., None], x[..., None]
    re = (s * size - mu) * (s * size + mu)
    im = -2 * mu * s * x
    scale = 1 / (re * re + im * im)
    return re * scale, -im * scale


def _points(length, dtype):
    """s and mu [blocks, BLOCK], filled up with the harmless point theta = pi."""
    s, mu = (jnp.asarray(part) for part in reference.grid(length, dtype))
    block = min(BLOCK, s.size)
    extra = -s.size % block
    s = jnp.pad(s, (0, extra))
    mu = jnp.pad(mu, (0, extra), constant_values=4)
    return s.reshape(-1, block), mu.reshape(-1, block)


def _joined(blocks):
    """[blocks, ..., F] -> [..., blocks F]."""
    moved = jnp.moveaxis(blocks, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)
