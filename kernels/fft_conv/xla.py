"""FFTs through XLA: one of a fast length for the whole sequence.

What goes beyond the end of the circular convolution falls on the part that is not
wanted, as in overlap-save.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from kernels import compat
from kernels.fft_conv import monarch, windows


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """In v's own precision, whatever `low` is; see reference.convolve."""
    return windows.convolve(window, transform(), v, k, k_reverse, state, segment)


def transform():
    """For the blocks of `segmented`, in the input's own precision: of many short ones
    XLA's FFT takes minutes to compile on a TPU, where matmuls take its place."""
    return monarch.Monarch(low=False) if compat.platform() == "tpu" else FFT()


@dataclass(frozen=True)
class FFT:
    """Transforms of real sequences; a spectrum is (re, im)."""

    def plan(self, least):
        return next_fast_len(least, real=True)

    def forward(self, plan, *arrays):
        spectra = (jnp.fft.rfft(x, plan) for x in arrays)
        return [(X.real, X.imag) for X in spectra]

    def inverse(self, plan, count, *spectra):
        arrays = (jnp.fft.irfft(jax.lax.complex(*X), plan) for X in spectra)
        return [x[..., :count] for x in arrays]

    def shift(self, plan, by, dtype):
        turn = np.exp(-2j * np.pi * (np.arange(plan // 2 + 1) * by % plan) / plan)
        return jnp.asarray(turn.real, dtype), jnp.asarray(turn.imag, dtype)


def window(v, taps, start, count):
    """y[start : start + count] of v [B, H, T] convolved with taps [H, K]."""
    points = windows.least(v.shape[-1], taps.shape[-1], start, count)
    size = next_fast_len(points, real=True)
    return circular(v, taps, size)[..., start : start + count]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def circular(v, k, size):
    """Circular convolution of `size` points: v [B, H, *], k [H, *]."""
    return jnp.fft.irfft(jnp.fft.rfft(v, size) * jnp.fft.rfft(k, size), size)


def _forward(v, k, size):
    return circular(v, k, size), (v, k)


def _backward(size, saved, dy):
    """Correlations; the spectra are made again rather than kept. With F the transform:

    dv = F^-1(F(dy) conj F(k)),    dk = sum_b F^-1(F(dy) conj F(v)).
    """
    v, k = saved
    dy_f = jnp.fft.rfft(dy, size)
    dv = jnp.fft.irfft(dy_f * jnp.fft.rfft(k, size).conj(), size)
    product = dy_f * jnp.fft.rfft(v, size).conj()
    dk = jnp.fft.irfft(product.sum(0), size)
    return dv[..., : v.shape[-1]], dk[..., : k.shape[-1]]


circular.defvjp(_forward, _backward)
