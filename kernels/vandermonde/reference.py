"""The definitions as naive sums over powers that are exact in phase."""

import jax.numpy as jnp


def unsupported(*arguments) -> str | None:
    return None


def powers(log_z, length):
    """z^l, [..., N, L]: the product over the binary digits of l of exp(2^k log_z)."""
    l = jnp.arange(length)
    result = jnp.ones((*log_z.shape, length), log_z.dtype)
    for digit in range(length.bit_length()):
        factor = jnp.exp(2.0**digit * log_z)[..., None]
        result = result * jnp.where(l >> digit & 1 == 1, factor, 1)
    return result


def vandermonde(c, log_z, length):
    """K[l] = Re sum_n c[n] exp(l log_z[n])."""
    return jnp.sum(c[..., None] * powers(log_z, length), -2).real


def moments(u, log_z):
    """s[n] = sum_l u[l] exp(l log_z[n])."""
    return jnp.sum(u[..., None, :] * powers(log_z, u.shape[-1]), -1)
