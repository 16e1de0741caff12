"""S5, the multi-input diagonal model (https://arxiv.org/abs/2208.04933)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers import checks, parameters
from layers.facts import examples
from layers.parameters import at_least_complex64, constant, logical
from ssm import discretize, recurrence, spectra, stability
from ssm import sequence as seq

C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


class S5(nn.Module):
    """x[t] = a x[t-1] + gain (B u[t]), y[t] = kappa Re(C x[t]) + D u[t].

    kappa = 2 with conjugate symmetry, 1 without; Lambda starts at the normal part of
    HiPPO-LegS in `blocks` blocks, B and C in its eigenbasis; dt is one per state.

    Attributes:
        features: H.
        state_size: N, the real state size; P = N / 2 states are stored if conj_sym.
        blocks: J, number of HiPPO blocks.
        discretization: a key of `ssm.discretize.DISCRETIZATIONS`.
        c_init: one of `C_INITS`.
        conj_sym: store one of each conjugate pair.
        clip_eigs: keep Re Lambda <= -1e-4, for unbounded rollouts.
        dt_min, dt_max: range of the initial dt.
        step_scale: multiplies dt, to run at another sampling rate than in training.
        bidirectional: adds the same scan from the end, with its own C; then no state.
        dtype: of the output; parameters and states are float32 or better.
    """

    EXAMPLES = examples(
        dict(state_size=8, blocks=2),
        dirac=dict(state_size=8, discretization="dirac"),
        **{"without conj_sym": dict(state_size=8, conj_sym=False)},
        bidirectional=dict(state_size=8, bidirectional=True),
    )

    features: int
    state_size: int = 64
    blocks: int = 1
    discretization: str = "zoh"
    c_init: str = "lecun_normal"
    conj_sym: bool = True
    clip_eigs: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    step_scale: float = 1.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @checks.also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, P] complex (None if bidirectional).

        `ValueError` for a wrong shape, or a state given to a bidirectional layer.
        """
        del train
        sequence = checks.checked(self, x, state, sequence)
        lam, dt, B, C, D = self._parameters()
        x = x.astype(parameters.at_least_float32(self.dtype))
        u = seq.zero_masked(x, sequence)
        rule = functools.partial(discretize.get(self.discretization), lam, dt)
        run = functools.partial(
            recurrence.mixed,
            rule,
            B,
            u=u,
            elapsed=seq.elapsed(sequence),
            reset=sequence.reset,
        )
        y, state = run(C=C[0], state=state)
        if self.bidirectional:
            future, _ = run(C=C[1], reverse=True)
            y, state = y + future, None
        y = seq.zero_masked(y + D * u, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, P] complex."""
        checks.recurrent(self)
        count = self.state_size // (1 + self.conj_sym)
        return jnp.zeros((batch_size, count), at_least_complex64(self.dtype))

    def eigenvalues(self) -> jax.Array:
        """log a [P] complex per token, a the eigenvalues of the recurrence; one of
        each pair if conj_sym. By `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, *_ = self._parameters()
        log_a, _ = discretize.get(self.discretization)(lam, dt)
        return log_a

    @nn.compact
    def _parameters(self):
        H, N = self.features, self.state_size
        checks.even(self, "state_size")
        checks.positive(self, "step_scale")
        checks.one_of(self, c_init=C_INITS)
        lam, V, V_inv = spectra.s5_blocks(N, self.blocks)
        if not self.conj_sym:
            lam = np.concatenate([lam, lam.conj()])
            V = np.concatenate([V, V.conj()], axis=1)
            V_inv = V.conj().T
        P = len(lam)
        Lambda_re = self.param("Lambda_re", logical(constant(lam.real), "state"), (P,))
        Lambda_im = self.param("Lambda_im", logical(constant(lam.imag), "state"), (P,))
        B = self.param("B", logical(_b_init(V_inv), "state", "embed", None), (P, H, 2))
        C = self.param(
            "C",
            logical(_c_init(self.c_init, V), None, "embed", "state", None),
            (1 + self.bidirectional, H, P, 2),
        )
        D = parameters.skip(self)
        log_step = parameters.log_dt(self, "log_step", "state", P)
        lam = jax.lax.complex(Lambda_re, Lambda_im)
        if self.clip_eigs:
            lam = stability.clip_real(lam)
        kappa = 2.0 if self.conj_sym else 1.0
        dt = self.step_scale * jnp.exp(log_step)
        return lam, dt, stability.from_pair(B), kappa * stability.from_pair(C), D


def _b_init(V_inv):
    """B = V^-1 times a real LeCun-normal sample [N, H] (fan-in N, as published)."""

    def init(key, shape, dtype=jnp.float32):
        sample = nn.initializers.lecun_normal()(key, (V_inv.shape[1], shape[1]), dtype)
        rotated = jnp.asarray(V_inv, jnp.complex64) @ sample
        return stability.to_pair(rotated).astype(dtype)

    return init


def _c_init(name, V):
    """The published initialisations of C [k, H, P], k directions.

    Samples [H, N] are rotated by V, except "complex_normal", which is drawn in the
    eigenbasis. Each part of a sample has the standard deviation given here; that of
    "lecun_normal" counts the features in its fan-in, as the published numbers do.
    """
    N = V.shape[0]

    def init(key, shape, dtype=jnp.float32):
        directions, H, _, _ = shape
        if name == "complex_normal":
            return jax.random.normal(key, shape, dtype) * 0.5**0.5
        std = {"trunc_standard_normal": N**-0.5, "lecun_normal": (N * H) ** -0.5}[name]
        # 0.8796 is the standard deviation of a unit normal truncated to [-2, 2].
        draw = jax.random.truncated_normal(key, -2.0, 2.0, (directions, H, N, 2), dtype)
        sample = stability.from_pair(draw * (std / 0.87962566103423978))
        return stability.to_pair(sample @ jnp.asarray(V, jnp.complex64)).astype(dtype)

    return init
