"""DSS: diagonal state spaces, exp and softmax (https://arxiv.org/abs/2203.14343)."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import fft_conv, vandermonde
from layers.checks import also_empty, checked, no_initial_state
from layers.diagonal import diagonal_modes
from layers.facts import S4_BLOCK, Examples, L
from layers.parameters import (
    at_least_complex64,
    at_least_float32,
    complex_normal,
    constant,
    logical,
)
from ssm import recurrence, spectra, stability
from ssm import sequence as seq
from ssm.discretize import expm1_ratio

EPSILON = 1e-7  # in reciprocals, which are conj(x) / (|x|^2 + EPSILON)
VARIANTS = ("softmax", "exp")


class DSS(nn.Module):
    """H diagonal systems without B, K_l = Re sum_n C_n w_n(l), a = dt lam, and

        exp:      w_n(l) = (e^a - 1) / lam e^(a l),          lam = -exp(A_re) + i A_im,
        softmax:  w_n(l) = softmax over l < length of (a l), divided by lam,
                  lam = A_re + i A_im, of any sign.

    The exp variant is S4D with ZOH. The softmax is divided by its sum over `length`, a
    constant, so it has the same recurrence; modes with a positive real part grow, and
    a state or a call longer than `length` overflows after about 88 / Re(a) tokens.

    Attributes:
        features: H.
        length: of the calls in training, over which the softmax is normalised.
        state_size: N, real; n = N / 2 complex modes are stored.
        variant: one of `VARIANTS`.
        dt_min, dt_max: range of the initial dt; memory is about 1 / dt tokens.
        step_scale: multiplies dt, to run at another sampling rate than in training; the
            softmax is then that of length / step_scale tokens, the same time.
        bidirectional: adds a second filter over the future; then there is no state.
        dtype: of the output; parameters, filters and states are float32 or better.
    """

    PLACEMENT = S4_BLOCK
    EXAMPLES = Examples(
        {
            "": dict(length=L, state_size=8),
            "exp": dict(length=L, state_size=8, variant="exp"),
            "bidirectional": dict(length=L, state_size=8, bidirectional=True),
        }
    )

    features: int
    length: int
    state_size: int = 64
    variant: str = "softmax"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    step_scale: float = 1.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def REFUSES(self):
        """Elapsed times where it convolves in both directions."""
        return ("dt",) if self.bidirectional else ()

    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, H, n] complex (None if bidirectional).

        `ValueError` for a wrong shape, or a state given to a bidirectional layer.
        """
        del train
        sequence = checked(self, x, state, sequence)
        lam, dt, C, D = self._parameters()
        u = x.astype(at_least_float32(self.dtype))
        if self.bidirectional:
            y, state = self._both_directions(lam, dt, C, D, u, sequence), None
        else:
            system = self._system(lam, dt, C[0])

            def convolve(u, mask):
                K = self._filter(lam, dt, C[0], u.shape[1])
                y, _ = fft_conv(u, K, skip=D)
                return y, recurrence.final_state(system, u, mask)

            y, state = diagonal_modes(self, system, convolve, D, u, state, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size):
        """Zeros [B, H, n] complex."""
        if self.bidirectional:
            raise no_initial_state("DSS")
        shape = batch_size, self.features, self.state_size // 2
        return jnp.zeros(shape, at_least_complex64(self.dtype))

    def eigenvalues(self):
        """log a [H, n] complex per token, a the eigenvalues of the recurrence. By
        `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, _, _ = self._parameters()
        return dt * lam

    @nn.compact
    def _parameters(self):
        H, n = self.features, self.state_size // 2
        self._check()
        lam = spectra.s4d("legs", n)
        real = (
            stability.inverse("exp", -lam.real) if self.variant == "exp" else lam.real
        )
        names = ("embed", "state")
        A_re = self.param("A_re", logical(constant(real), None, "state"), (1, n))
        A_im = self.param("A_im", logical(constant(lam.imag), None, "state"), (1, n))
        C = self.param(
            "C",
            logical(complex_normal(), None, *names, None),
            (1 + self.bidirectional, H, n, 2),
        )
        log_dt = self.param(
            "log_dt",
            logical(
                functools.partial(
                    spectra.log_dt, dt_min=self.dt_min, dt_max=self.dt_max
                ),
                "embed",
            ),
            (H,),
        )
        D = self.param("D", logical(nn.initializers.normal(1.0), "embed"), (H,))
        lam = jax.lax.complex(-jnp.exp(A_re) if self.variant == "exp" else A_re, A_im)
        dt = self.step_scale * jnp.exp(log_dt)[:, None]
        return lam, dt, stability.from_pair(C), D

    def _check(self):
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(
                f"state_size: must be even and at least 2, got {self.state_size}"
            )
        if self.variant not in VARIANTS:
            raise ValueError(
                f"variant: unknown {self.variant!r}; may be {list(VARIANTS)}"
            )
        if self.length < 1:
            raise ValueError(f"length: must be at least 1, got {self.length}")
        if self.step_scale <= 0:
            raise ValueError(f"step_scale: must be positive, got {self.step_scale}")

    def _weights(self, lam, dt, C):
        """Of the decaying exponentials z = a or, where Re a > 0, -a: C / lam
        (e^z - 1) / (e^(z length) - 1), and z itself."""
        a = dt * lam
        z = jnp.where(a.real > 0, -a, a)
        tokens = self.length / self.step_scale
        share = expm1_ratio(z) * _reciprocal(tokens * expm1_ratio(tokens * z))
        return C * _reciprocal(lam) * share, z

    def _system(self, lam, dt, C):
        """The recurrence whose impulse response is the filter."""
        a = dt * lam
        if self.variant == "exp":
            return recurrence.Diagonal(a, dt * expm1_ratio(a), C)
        weights, z = self._weights(lam, dt, C)
        tokens = self.length / self.step_scale
        start = jnp.where(a.real > 0, jnp.exp((tokens - 1) * z), 1)
        return recurrence.Diagonal(a, jnp.ones_like(a), weights * start)

    def _filter(self, lam, dt, C, L):
        """K [H, L]. Growing modes are summed backwards from their end, at `length`."""
        system = self._system(lam, dt, C)
        whole = math.ceil(self.length / self.step_scale)
        if self.variant == "exp" or whole < L:
            return vandermonde(system.c * system.b, system.log_a, L)
        weights, z = self._weights(lam, dt, C)
        grows = (dt * lam).real > 0
        end = jnp.exp((self.length / self.step_scale - whole) * z) * weights
        parts = jnp.stack([jnp.where(grows, 0, weights), jnp.where(grows, end, 0)])
        forward, backward = vandermonde(parts, z, whole)
        # XLA (jax 0.10.2, CPU) dies of the reverse of a sum over an axis of size 1, as
        # gradients may bring it here; the barrier keeps the two apart.
        backward = jax.lax.optimization_barrier(backward[:, ::-1])
        return (forward + backward)[:, :L]

    def _both_directions(self, lam, dt, C, D, u, sequence):
        if sequence.dt is not None:
            raise ValueError(
                "dt: a bidirectional DSS convolves and needs regular steps; pass None"
            )
        u, compacted, restore = seq.compact(u, sequence)
        past, future = (self._filter(lam, dt, c, u.shape[1]) for c in C)
        y, _ = fft_conv(u, past, k_reverse=future, skip=D, reset=compacted.reset)
        return restore(y)


def _reciprocal(x):
    return x.conj() / (x.real**2 + x.imag**2 + EPSILON)
