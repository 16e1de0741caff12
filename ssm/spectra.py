"""Initial eigenvalues and timescales. NumPy float64 where nothing is random."""

import jax
import jax.numpy as jnp
import numpy as np

from ssm import hippo


def s4d_lin(n: int) -> np.ndarray:
    """S4D-Lin: lam_j = -1/2 - i pi j."""
    return -0.5 - 1j * np.pi * np.arange(n)


def s4d_inv(n: int) -> np.ndarray:
    """S4D-Inv, asymptotically LegS: lam_j = -1/2 - i (N/pi) (N/(2j+1) - 1), N = 2n."""
    N = 2 * n
    return -0.5 - 1j * (N / np.pi) * (N / (2 * np.arange(n) + 1) - 1)


def s4d_inv2(n: int) -> np.ndarray:
    """S4D-Inv2: lam_j = -1/2 - i (N/pi) (N/(j+1) - 1), N = 2n."""
    N = 2 * n
    return -0.5 - 1j * (N / np.pi) * (N / (np.arange(n) + 1) - 1)


def s4d_quad(n: int) -> np.ndarray:
    """S4D-Quad: lam_j = -1/2 - i (1 + 2j)^2 / pi."""
    return -0.5 - 1j * (1 + 2 * np.arange(n)) ** 2 / np.pi


def s4d_legs(n: int) -> np.ndarray:
    """S4D-LegS: the eigenvalues of the normal part of HiPPO-LegS of size N = 2n."""
    return hippo.hippo_n(2 * n)[0]


def s4d_real(n: int) -> np.ndarray:
    """S4D-Real: lam_j = -(j + 1). An initial value: imaginary parts start at 0 and are
    trained like any other."""
    return -(1.0 + np.arange(n)) + 0j


SPECTRA = {
    "lin": s4d_lin,
    "inv": s4d_inv,
    "inv2": s4d_inv2,
    "quad": s4d_quad,
    "legs": s4d_legs,
    "real": s4d_real,
}


def s4d(name: str, n: int) -> np.ndarray:
    """Initial lam [n] complex128 of a diagonal system with n conjugate pairs.

    Source: https://arxiv.org/abs/2206.11893. `ValueError` for an unknown name.
    """
    if name not in SPECTRA:
        raise ValueError(f"spectrum: must be one of {sorted(SPECTRA)}, got {name!r}")
    return SPECTRA[name](n)


def s5_blocks(
    state_size: int, blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-N in J = `blocks` blocks of size state_size / J.

    Returns lam [P], V [state_size, P] and its left inverse V* [P, state_size], with
    P = state_size / 2 conjugate pairs. Source: https://arxiv.org/abs/2208.04933.
    `ValueError` unless `blocks` divides state_size into even sizes.
    """
    if blocks < 1 or state_size % blocks or (state_size // blocks) % 2:
        raise ValueError(
            f"blocks: must divide state_size={state_size} into even sizes, got {blocks}"
        )
    lam, V = hippo.hippo_n(state_size // blocks)
    size, half = V.shape
    full = np.zeros((state_size, blocks * half), np.complex128)
    for j in range(blocks):
        full[j * size : (j + 1) * size, j * half : (j + 1) * half] = V
    return np.tile(lam, blocks), full, full.conj().T


TINY = 1e-7  # keeps the logarithms below finite at the ends of their intervals


def lru_nu(
    key: jax.Array,
    P: int,
    r_min: float = 0.0,
    r_max: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """LRU: nu_log [P] with |lam| = exp(-exp(nu_log)) and |lam|^2 uniform in
    [r_min^2, r_max^2]. Source: https://arxiv.org/abs/2303.06349."""
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(
            f"r_min, r_max: must satisfy 0 <= r_min < r_max <= 1, got {r_min}, {r_max}"
        )
    square = jax.random.uniform(key, (P,), dtype, TINY, 1 - TINY)
    return jnp.log(-0.5 * jnp.log(square * (r_max**2 - r_min**2) + r_min**2))


def lru_theta(
    key: jax.Array, P: int, max_phase: float = 2 * np.pi, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """LRU: theta_log [P] with the phase exp(theta_log) uniform in [0, max_phase]."""
    if not 0 < max_phase <= 2 * np.pi:
        raise ValueError(f"max_phase: must be in (0, 2 pi], got {max_phase}")
    return jnp.log(max_phase * jax.random.uniform(key, (P,), dtype, TINY))


def lru_gamma(nu_log: jax.Array) -> jax.Array:
    """LRU: gamma_log = log sqrt(1 - |lam|^2), which keeps the variance of the state at
    that of the input."""
    return 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log)))


def log_dt(
    key: jax.Array,
    shape: tuple[int, ...],
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """log dt, log-uniform in [dt_min, dt_max]: a memory of about 1/dt tokens, so take
    dt_min near 1 / (longest scale) and dt_max near 1 / (shortest)."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"dt_min, dt_max: must satisfy 0 < dt_min <= dt_max, got {dt_min}, {dt_max}"
        )
    return jax.random.uniform(key, shape, dtype, np.log(dt_min), np.log(dt_max))


def softplus_dt(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    *,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    floor: float = 1e-4,
) -> jax.Array:
    """b with softplus(b) log-uniform in [dt_min, dt_max] and not below `floor`: the
    bias of a step that depends on the input (Mamba)."""
    dt = jnp.exp(log_dt(key, shape, dt_min, dt_max, dtype))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))


def griffin_ring(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    *,
    a_min: float = 0.9,
    a_max: float = 0.999,
) -> jax.Array:
    """Lambda with a^2 uniform in [a_min^2, a_max^2] for a = exp(-softplus(Lambda)).
    Source: https://arxiv.org/abs/2402.19427."""
    if not 0 < a_min < a_max < 1:
        raise ValueError(
            f"a_min, a_max: must satisfy 0 < a_min < a_max < 1, got {a_min}, {a_max}"
        )
    square = jax.random.uniform(key, shape, dtype, a_min**2, a_max**2)
    rate = -0.5 * jnp.log(square)
    return jnp.log(jnp.expm1(rate))
