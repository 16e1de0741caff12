"""S4D, the diagonal state-space model (https://arxiv.org/abs/2206.11893)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import fft_conv
from layers.checks import also_empty, checked, no_initial_state
from layers.diagonal import diagonal_modes
from layers.facts import S4_BLOCK, Examples
from layers.parameters import (
    at_least_complex64,
    at_least_float32,
    complex_normal,
    constant,
    logical,
)
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

    PLACEMENT = S4_BLOCK
    EXAMPLES = Examples(
        {
            "": dict(state_size=8),
            "bilinear": dict(state_size=8, discretization="bilinear"),
            "tied": dict(state_size=8, spectrum="legs", copies=2),
            "bidirectional": dict(state_size=8, bidirectional=True),
        }
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
        lam, dt, B, C, D = self._parameters()
        u = x.astype(at_least_float32(self.dtype))
        if self.bidirectional:
            y, state = self._both_directions(lam, dt, B, C, D, u, sequence), None
        else:
            rule = functools.partial(discretize.get(self.discretization), lam, dt)
            log_a, gain = rule()
            system = recurrence.Diagonal(log_a, gain * B, 2.0 * C[0])
            y, state = self._forward(system, rule, B, D, u, state, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size):
        """Zeros [B, H, n] complex."""
        if self.bidirectional:
            raise no_initial_state("S4D")
        shape = batch_size, self.features, self.state_size // 2
        return jnp.zeros(shape, at_least_complex64(self.dtype))

    def eigenvalues(self):
        """log a [H, n] complex per token, a the eigenvalues of the recurrence; one of
        each conjugate pair. By `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, *_ = self._parameters()
        log_a, _ = discretize.get(self.discretization)(lam, dt)
        return log_a

    @nn.compact
    def _parameters(self):
        H, n = self.features, self.state_size // 2
        copies = self.copies or H
        if n < 1 or self.state_size % 2:
            raise ValueError(f"state_size: must be even, got {self.state_size}")
        if copies < 0 or H % copies:
            raise ValueError(f"copies: must divide features={H}, got {copies}")
        if self.step_scale <= 0:
            raise ValueError(f"step_scale: must be positive, got {self.step_scale}")
        lam = spectra.s4d(self.spectrum, n)
        rate = stability.inverse(self.transform, -lam.real)
        A_re = self.param("A_re", logical(constant(rate), None, "state"), (copies, n))
        A_im = self.param(
            "A_im", logical(constant(lam.imag), None, "state"), (copies, n)
        )
        B = self.param(
            "B", logical(constant([1.0, 0.0]), None, "state", None), (copies, n, 2)
        )
        C = self.param(
            "C",
            logical(complex_normal(), None, "embed", "state", None),
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
        f = stability.positive(self.transform).forward
        lam = jax.lax.complex(-f(A_re), A_im)
        each = H // copies
        lam, B = jnp.repeat(lam, each, 0), jnp.repeat(stability.from_pair(B), each, 0)
        dt = self.step_scale * jnp.exp(log_dt)[:, None]
        return lam, dt, B, stability.from_pair(C), D

    def _forward(self, system, rule, B, D, u, state, sequence):
        if sequence.dt is not None and self.discretization != "zoh":
            u = seq.zero_masked(u, sequence)
            y, state = recurrence.varying(
                rule, B, system.c, u, state, seq.elapsed(sequence), sequence.reset
            )
            return seq.zero_masked(y + D * u, sequence), state

        def convolve(u, mask):
            return recurrence.convolution(system, u, mask, skip=D)

        return diagonal_modes(self, system, convolve, D, u, state, sequence)

    def _both_directions(self, lam, dt, B, C, D, u, sequence):
        if sequence.dt is not None:
            raise ValueError(
                "dt: a bidirectional S4D convolves and needs regular steps; pass None"
            )
        log_a, gain = discretize.get(self.discretization)(lam, dt)
        u, compacted, restore = seq.compact(u, sequence)
        past, future = (
            filters.diagonal(log_a, gain * B, 2.0 * c, u.shape[1]) for c in C
        )
        y, _ = fft_conv(u, past, k_reverse=future, skip=D, reset=compacted.reset)
        return restore(y)
