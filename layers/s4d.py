"""S4D, the diagonal state-space model (https://arxiv.org/abs/2206.11893)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers import checks, convolutions, diagonal, parameters
from layers.facts import DT_BOTH_WAYS, S4_BLOCK, examples
from layers.parameters import complex_normal, constant, logical
from ssm import discretize, filters, recurrence, spectra, stability
from ssm import sequence as seq


class S4D(nn.Module):
    """H independent diagonal systems: y_h = Re sum_n 2 C_hn x_hn + D_h u_h.

    x' = A x + B u with A = -f(A_re) + i A_im, discretised with dt = exp(log_dt) per
    feature. A call without state, reset or dt is one FFT convolution; any other runs in
    chunks; L = 1 with a state is one O(n) step.

    Attributes:
        features: H.
        state_size: N, real; n = N / 2 conjugate pairs are stored.
        spectrum: initial eigenvalues, a key of `ssm.spectra.SPECTRA`.
        discretization: a key of `ssm.discretize.DISCRETIZATIONS`.
        transform: f, a key of `ssm.stability.POSITIVE`.
        dt_min, dt_max: range of the initial dt; memory is about 1 / dt tokens.
        copies: number of independent (A, B), tied over features / copies heads each;
            0 gives every feature its own.
        step_scale: multiplies dt, to run at another sampling rate than in training.
        bidirectional: adds a second filter over the future; then there is no state.
        dtype: of the output; parameters, filters and states are float32 or better.
    """

    REFUSES = DT_BOTH_WAYS
    PLACEMENT = S4_BLOCK
    EXAMPLES = examples(
        dict(state_size=8),
        bilinear=dict(state_size=8, discretization="bilinear"),
        tied=dict(state_size=8, spectrum="legs", copies=2),
        bidirectional=dict(state_size=8, bidirectional=True),
    )

    features: int
    state_size: int = 64
    spectrum: str = "lin"
    discretization: str = "zoh"
    transform: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    copies: int = 0
    step_scale: float = 1.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @checks.also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, H, n] complex (None if bidirectional).
        `ValueError` for a wrong shape, or a state given to a bidirectional layer."""
        del train
        sequence = checks.checked(self, x, state, sequence)
        lam, dt, B, C, D = self._parameters()
        u = x.astype(parameters.at_least_float32(self.dtype))
        rule = functools.partial(discretize.get(self.discretization), lam, dt)
        log_a, gain = rule()
        if self.bidirectional:
            checks.refuse_dt(self, sequence, checks.BOTH_WAYS)
            u, sequence, restore = seq.compact(u, sequence)
            K = [filters.diagonal(log_a, gain * B, 2.0 * c, u.shape[1]) for c in C]
            y = restore(convolutions.both_ways(u, K, sequence, D))
        elif sequence.dt is not None and self.discretization != "zoh":
            u, elapsed = seq.zero_masked(u, sequence), seq.elapsed(sequence)
            y, state = recurrence.varying(
                rule, B, 2.0 * C[0], u, state, elapsed, sequence.reset
            )
            y = seq.zero_masked(y + D * u, sequence)
        else:
            system = recurrence.Diagonal(log_a, gain * B, 2.0 * C[0])
            fft = functools.partial(recurrence.convolution, system, skip=D)
            y, state = diagonal.modes(self, system, fft, D, u, state, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, H, n] complex."""
        return diagonal.zero_modes(self, batch_size)

    def eigenvalues(self) -> jax.Array:
        """log a [H, n] complex per token, a the eigenvalues of the recurrence; one of
        each conjugate pair. By `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, *_ = self._parameters()
        return discretize.get(self.discretization)(lam, dt)[0]

    @nn.compact
    def _parameters(self):
        """lam [H, n], dt [H, 1], B [H, n], C [1 or 2, H, n] and D [H]."""
        H, n, copies = self.features, self.state_size // 2, checks.copies(self)
        checks.even(self, "state_size")
        checks.positive(self, "step_scale")
        lam = spectra.s4d(self.spectrum, n)
        rate = stability.inverse(self.transform, -lam.real)
        names, shape = (None, "state"), (copies, n)
        A_re = self.param("A_re", logical(constant(rate), *names), shape)
        A_im = self.param("A_im", logical(constant(lam.imag), *names), shape)
        ones = logical(constant([1.0, 0.0]), *names, None)
        B = self.param("B", ones, (*shape, 2))
        normal = logical(complex_normal(), None, "embed", "state", None)
        C = self.param("C", normal, (1 + self.bidirectional, H, n, 2))
        dt = self.step_scale * jnp.exp(parameters.log_dt(self))[:, None]
        D = parameters.skip(self)
        lam = jax.lax.complex(-stability.positive(self.transform).forward(A_re), A_im)
        lam, B = (jnp.repeat(z, H // copies, 0) for z in (lam, stability.from_pair(B)))
        return lam, dt, B, stability.from_pair(C), D
