"""LRU, the linear recurrent unit (https://arxiv.org/abs/2303.06349)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.checks import also_empty, at_least_one, checked
from layers.facts import examples
from layers.parameters import at_least_complex64, at_least_float32, logical, skip
from ssm import recurrence, spectra, stability
from ssm import sequence as seq


def _decay(log_lam, gamma, elapsed):
    return log_lam if elapsed is None else log_lam * elapsed, gamma


class LRU(nn.Module):
    """x[t] = lam x[t-1] + gamma (B u[t]), y[t] = Re(C x[t]) + D u[t].

    lam = exp(-exp(nu_log) + i exp(theta_log)) lies inside the unit disc whatever the
    parameters; gamma = exp(gamma_log) starts at sqrt(1 - |lam|^2). Elapsed time dt
    raises lam to the power dt and leaves gamma unchanged.

    Attributes:
        features: H.
        state_size: P, complex.
        r_min, r_max: |lam|^2 is initially uniform in [r_min^2, r_max^2].
        max_phase: initial phases are uniform in [0, max_phase].
        dtype: of the output; parameters and states are float32 or better.
    """

    EXAMPLES = examples(dict(state_size=8))

    features: int
    state_size: int = 64
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * np.pi
    dtype: jnp.dtype = jnp.float32

    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, P] complex. `ValueError` for a wrong
        shape."""
        del train
        sequence = checked(self, x, state, sequence)
        log_lam, gamma, B, C, D = self._parameters()
        u = seq.zero_masked(x.astype(at_least_float32(self.dtype)), sequence)
        rule = functools.partial(_decay, log_lam, gamma)
        y, state = recurrence.mixed(
            rule, B, C, u, state, seq.elapsed(sequence), sequence.reset
        )
        y = seq.zero_masked(y + D * u, sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, P] complex."""
        return jnp.zeros((batch_size, self.state_size), at_least_complex64(self.dtype))

    def eigenvalues(self) -> jax.Array:
        """log lam [P] complex, per token. By `layer.apply(variables,
        method="eigenvalues")`."""
        return self._parameters()[0]

    @nn.compact
    def _parameters(self):
        H, P = self.features, self.state_size
        at_least_one(self, "state_size")

        def nu(key, shape, dtype):
            return spectra.lru_nu(key, *shape, self.r_min, self.r_max, dtype)

        def theta(key, shape, dtype):
            return spectra.lru_theta(key, *shape, self.max_phase, dtype)

        def gamma(key, shape, dtype):
            return spectra.lru_gamma(nu_log).astype(dtype)

        nu_log = self.param("nu_log", logical(nu, "state"), (P,))
        theta_log = self.param("theta_log", logical(theta, "state"), (P,))
        gamma_log = self.param("gamma_log", logical(gamma, "state"), (P,))
        normal = nn.initializers.normal
        B = self.param(
            "B", logical(normal((2 * H) ** -0.5), "state", "embed", None), (P, H, 2)
        )
        C = self.param("C", logical(normal(P**-0.5), "embed", "state", None), (H, P, 2))
        B, C = stability.from_pair(B), stability.from_pair(C)
        log_lam = stability.ring(nu_log, theta_log)
        return log_lam, jnp.exp(gamma_log), B, C, skip(self)
