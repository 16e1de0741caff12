"""DSS: diagonal state spaces, exp and softmax (https://arxiv.org/abs/2203.14343)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import fft_conv, vandermonde
from layers import checks, convolutions, diagonal, parameters
from layers.facts import DT_BOTH_WAYS, S4_BLOCK, L, examples
from layers.parameters import complex_normal, constant, logical
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

    REFUSES = DT_BOTH_WAYS
    PLACEMENT = S4_BLOCK
    EXAMPLES = examples(
        dict(length=L, state_size=8),
        exp=dict(length=L, state_size=8, variant="exp"),
        bidirectional=dict(length=L, state_size=8, bidirectional=True),
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

    @checks.also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, H, n] complex (None if bidirectional).

        `ValueError` for a wrong shape, or a state given to a bidirectional layer.
        """
        del train
        sequence = checks.checked(self, x, state, sequence)
        lam, dt, C, D = self._parameters()
        u = x.astype(parameters.at_least_float32(self.dtype))
        if self.bidirectional:
            checks.refuse_dt(self, sequence, checks.BOTH_WAYS)
            u, sequence, restore = seq.compact(u, sequence)
            K = [self._filter(lam, dt, c, u.shape[1]) for c in C]
            y = restore(convolutions.both_ways(u, K, sequence, D))
        else:
            system = self._system(lam, dt, C[0])

            def convolve(u, mask):
                K = self._filter(lam, dt, C[0], u.shape[1])
                y, _ = fft_conv(u, K, skip=D)
                return y, recurrence.final_state(system, u, mask)

            y, state = diagonal.modes(self, system, convolve, D, u, state, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, H, n] complex."""
        return diagonal.zero_modes(self, batch_size)

    def eigenvalues(self) -> jax.Array:
        """log a [H, n] complex per token, a the eigenvalues of the recurrence. By
        `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, _, _ = self._parameters()
        return dt * lam

    @nn.compact
    def _parameters(self):
        """lam [1, n], dt [H, 1], C [1 or 2, H, n] and D [H]."""
        H, n = self.features, self.state_size // 2
        checks.even(self, "state_size")
        checks.one_of(self, variant=VARIANTS)
        checks.at_least_one(self, "length")
        checks.positive(self, "step_scale")
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
        dt = self.step_scale * jnp.exp(parameters.log_dt(self))[:, None]
        D = parameters.skip(self)
        lam = jax.lax.complex(-jnp.exp(A_re) if self.variant == "exp" else A_re, A_im)
        return lam, dt, stability.from_pair(C), D

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
        taps = math.ceil(self.length / self.step_scale)
        if self.variant == "exp" or taps < L:
            return vandermonde(system.c * system.b, system.log_a, L)
        weights, z = self._weights(lam, dt, C)
        grows = (dt * lam).real > 0
        end = jnp.exp((self.length / self.step_scale - taps) * z) * weights
        parts = jnp.stack([jnp.where(grows, 0, weights), jnp.where(grows, end, 0)])
        forward, backward = vandermonde(parts, z, taps)
        # XLA (jax 0.10.2, CPU) dies of the reverse of a sum over an axis of size 1, as
        # gradients may bring it here; the barrier keeps the two apart.
        backward = jax.lax.optimization_barrier(backward[:, ::-1])
        return (forward + backward)[:, :L]


def _reciprocal(x):
    return x.conj() / (x.real**2 + x.imag**2 + EPSILON)
