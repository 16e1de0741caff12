"""S4: diagonal plus low rank systems, bilinear (https://arxiv.org/abs/2111.00396,
https://arxiv.org/abs/2206.12037)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import fft_conv, segments
from layers import checks, diagonal, parameters
from layers.facts import DT_BOTH_WAYS, S4_BLOCK, L, examples
from layers.parameters import complex_normal, constant, constant_pair, logical
from ssm import discretize, dplr, filters, hippo, stability
from ssm import sequence as seq


class S4(nn.Module):
    """H systems y = 2 Re(C x) + D u, x' = A x + B u, A = Lam - P P* from HiPPO.

    Lam = -f(A_re) + i A_im, dt = exp(log_dt) per feature. The parameter is
    C~ = C (I - A_bar^length), so that the filter of `length` taps needs no power of
    A_bar; C itself is solved for where a state enters, a call is longer than `length`
    or `step_scale` is not 1. A call without a state is one FFT convolution, L = 1 with
    a state one O(n R) step; see `layers.diagonal.prepare` for decoding. The solve is
    as exact as 1 - exp(length dt lam) is far from 0: where lam is nearly 0 (the mean of
    the measure `fout`), some digits are lost.

    B starts as HiPPO's input vector in the eigenbasis of the normal part, unaltered, as
    in the paper. The authors' code clips its imaginary part to [-2, 2], so that a first
    B differs from that code's by intention: eigenvectors have no phase of their own,
    and what is clipped depends on the one that the eigensolver happens to give.

    Attributes:
        features: H.
        length: of the calls in training; longer ones work, and cost a dense power.
        state_size: N, real; n = N / 2 conjugate pairs are stored.
        measure: of HiPPO, a key of `ssm.hippo.LOW_RANK`.
        rank: R of P, from that of the measure to 3.
        transform: f, a key of `ssm.stability.POSITIVE`.
        dt_min, dt_max: range of the initial dt; memory is about 1 / dt tokens.
        copies: number of independent (A, P, B), tied over features / copies heads each;
            0 gives every feature its own.
        step_scale: multiplies dt, to run at another sampling rate than in training.
        bidirectional: adds a second filter over the future; then there is no state.
        dtype: of the output; parameters, filters and states are float32 or better.
    """

    REFUSES = DT_BOTH_WAYS
    PLACEMENT = S4_BLOCK
    EXAMPLES = examples(
        dict(length=L, state_size=8),
        legt=dict(length=L - 4, state_size=8, measure="legt", rank=2),
        tied=dict(length=2 * L, state_size=8, copies=2, step_scale=2.0),
        bidirectional=dict(length=2 * L, state_size=8, bidirectional=True),
    )

    features: int
    length: int
    state_size: int = 64
    measure: str = "legs"
    rank: int = 1
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

        `ValueError` for a wrong shape, or a state given to a bidirectional layer.
        """
        del train
        sequence = checks.checked(self, x, state, sequence)
        system, C_tilde, D = self._parameters()
        x = x.astype(parameters.at_least_float32(self.dtype))
        u = seq.zero_masked(x, sequence)
        if self.bidirectional:
            checks.refuse_dt(self, sequence, checks.BOTH_WAYS)
        if sequence.dt is not None:
            y, state = self._varying(system, C_tilde, D, u, state, sequence)
        elif u.shape[1] == 1 and state is not None:
            y, state = self._step(system, C_tilde, D, u, state, sequence)
        else:
            y, state = self._convolution(system, C_tilde, D, u, state, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, H, n] complex."""
        return diagonal.zero_modes(self, batch_size)

    def eigenvalues(self) -> jax.Array:
        """log a [H, n] complex per token, a the eigenvalues of the recurrence without
        its low-rank term. By `layer.apply(variables, method="eigenvalues")`."""
        system, _, _ = self._parameters()
        return discretize.bilinear(system.lam, self._scaled(system).dt)[0]

    @nn.compact
    def _parameters(self):
        """The system at the trained rate, C~ [1 or 2, H, n] and D."""
        H, n = self.features, self.state_size // 2
        checks.even(self, "state_size")
        checks.at_least_one(self, "length")
        checks.positive(self, "step_scale")
        copies = checks.copies(self)
        lam, P, B, _ = hippo.nplr(self.measure, self.state_size, self.rank)
        rate = stability.inverse(self.transform, -lam.real)
        names, shape = (None, "state"), (copies, n)
        A_re = self.param("A_re", logical(constant(rate), *names), shape)
        A_im = self.param("A_im", logical(constant(lam.imag), *names), shape)
        P = self.param(
            "P",
            logical(constant_pair(P[:, None]), None, *names, None),
            (self.rank, copies, n, 2),
        )
        B = self.param("B", logical(constant_pair(B), *names, None), (copies, n, 2))
        dt = jnp.exp(parameters.log_dt(self))[:, None]
        f = stability.positive(self.transform).forward
        lam = jax.lax.complex(-f(A_re), A_im)
        P, B = stability.from_pair(P), stability.from_pair(B)
        lam, P, B = (jnp.repeat(z, H // copies, -2) for z in (lam, P, B))
        system = dplr.DPLR(lam, P, B, dt)

        def initial_c_tilde(key, shape, dtype=jnp.float32):
            C = stability.from_pair(complex_normal()(key, shape, dtype))
            return stability.to_pair(dplr.truncated(system, C, self.length))

        C_tilde = self.param(
            "C",
            logical(initial_c_tilde, None, "embed", "state", None),
            (1 + self.bidirectional, H, n, 2),
        )
        return system, stability.from_pair(C_tilde), parameters.skip(self)

    def _scaled(self, system):
        return system._replace(dt=self.step_scale * system.dt)

    def _filters(self, system, C_tilde, L):
        """K [1 or 2, H, L]."""
        if self.step_scale == 1:
            times = max(1, -(-L // self.length))
            C_tilde = dplr.lengthened(system, C_tilde, self.length, times)
            return filters.dplr(system, C_tilde, times * self.length)[..., :L]
        C = dplr.untruncated(system, C_tilde, self.length)
        scaled = self._scaled(system)
        return filters.dplr(scaled, dplr.truncated(scaled, C, L), L)

    def _convolution(self, system, C_tilde, D, u, state, sequence):
        u, compacted, restore = seq.compact(u, sequence)
        mask, reset = compacted.mask, compacted.reset
        K = self._filters(system, C_tilde, u.shape[1])
        future = K[1] if self.bidirectional else None
        y, _ = fft_conv(u, K[0], k_reverse=future, skip=D, reset=reset)
        if self.bidirectional:
            return restore(y), None
        scaled, before = self._scaled(system), state
        if reset is not None:
            # The state is that of the last segment, and the old one reaches the first.
            segment = segments.ids(reset)
            u = jnp.where((segment == segment[:, -1:])[..., None], u, 0)
            if state is not None:
                before = jnp.where(segment[:, -1, None, None] > 0, 0, state)
        aligned = u if mask is None else seq.align_right(u, mask)
        counts = None if mask is None else seq.lengths(mask)
        final = dplr.final_state(scaled, aligned, before, counts)
        if state is not None:
            C = dplr.untruncated(system, C_tilde[0], self.length)
            response = dplr.response(scaled, C, state, u.shape[1])
            if reset is not None:
                response = jnp.where((segment == 0)[..., None], response, 0)
            y = y + response
        return restore(y), final

    def _step(self, system, C_tilde, D, u, state, sequence):
        def constants():
            scaled = self._scaled(system)
            C = dplr.untruncated(system, C_tilde[0], self.length)
            return scaled, dplr.prepare(scaled), C

        scaled, prepared, C = diagonal.computed_once(self, "step", constants)
        if sequence.reset is not None:
            state = jnp.where(sequence.reset[:, :1, None], 0, state)
        new = dplr.step(scaled, prepared, u[:, 0], state)
        if sequence.mask is not None:
            new = jnp.where(sequence.mask[:, :1, None], new, state)
        y = (dplr.output(C, new) + D * u[:, 0])[:, None]
        return seq.zero_masked(y, sequence), new

    def _varying(self, system, C_tilde, D, u, state, sequence):
        C = dplr.untruncated(system, C_tilde[0], self.length)
        y, state = dplr.varying(
            self._scaled(system), C, u, state, seq.elapsed(sequence), sequence.reset
        )
        return seq.zero_masked(y + D * u, sequence), state
