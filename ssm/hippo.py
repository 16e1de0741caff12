"""HiPPO: what a linear state remembers of its input. NumPy float64.

A measure gives A [N, N] and B [N] of x' = A x + B u. The state is a projection of the
past: with K_n(t) = (e^{tA} B)_n = p_n(t) w(t), t the time ago,

    x_n(now) = int_0^inf K_n(t) u(now - t) dt,      u(now - t) ~ sum_n x_n(now) p_n(t),

where the p_n are orthonormal under the weight w. Throughout r_n = sqrt(2n + 1).

Sources: HiPPO (https://arxiv.org/abs/2008.07669) for the measures, S4
(https://arxiv.org/abs/2111.00396) for the normal plus low-rank form, How to Train Your
HiPPO (https://arxiv.org/abs/2206.12037) for the kernels. The p_n and w are in
`ssm.hippo_memory`.
"""

import inspect

import numpy as np
import scipy.special


def legs(N: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS. A_nk = -r_n r_k below the diagonal, -(n+1) on it, 0 above; B_n = r_n.
    Exponential decay of the past: w = e^{-t}. Returns A [N, N], B [N]."""
    n = np.arange(N, dtype=np.float64)
    r = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(r, r), -1) - np.diag(n + 1)
    return A, r


def legsd(N: int) -> tuple[np.ndarray, np.ndarray]:
    """LegS without its low-rank part: A_legs + B B^T / 2, B_n = r_n / 2; a normal A
    whose kernels tend to those of LegS as N grows."""
    A, B = legs(N)
    return A + 0.5 * np.outer(B, B), 0.5 * B


def legt(N: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegT. A_nk = -r_n r_k / 2 for k <= n, times (-1)^{n-k} for k > n;
    B_n = r_n / 2. A sliding window of 2."""
    n = np.arange(N)
    r = np.sqrt(2.0 * n + 1)
    sign = np.where(n > n[:, None], (-1.0) ** (n[:, None] - n), 1.0)
    return -0.5 * np.outer(r, r) * sign, 0.5 * r


def lmu(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Legendre memory unit. A_nk = (2n+1) (-1)^{n-k+1} for k <= n, -(2n+1) for k > n;
    B_n = (2n+1) (-1)^n. A sliding window of 1: with T = diag((-1)^n / r_n),
    T A T^{-1} = 2 A_legt and T B = 2 B_legt. Source: Voelker et al., NeurIPS 2019."""
    n = np.arange(N)
    sign = np.where(n > n[:, None], -1.0, (-1.0) ** (n[:, None] - n + 1))
    return (2.0 * n + 1)[:, None] * sign, (2.0 * n + 1) * (-1.0) ** n


def lagt(N: int, beta: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LagT. A = -1/2 on the diagonal, -1 below it; B_n = beta (a scale only)."""
    return 0.5 * np.eye(N) - np.tril(np.ones((N, N))), np.full(N, float(beta))


def tlagt(N: int, beta: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """LagT with a tilt. A = -(1 + beta)/2 on the diagonal, -1 below it; B_n = beta.
    beta = 1 is the untilted weight e^{-t}."""
    _positive("beta", beta)
    A = 0.5 * (1 - beta) * np.eye(N) - np.tril(np.ones((N, N)))
    return A, np.full(N, float(beta))


def glagt(
    N: int, alpha: float = 0.0, beta: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised LagT, -1 < alpha < 1, beta > 0. A = -(1 + beta)/2 on the diagonal,
    -g_k/g_n below it; B_n = c binom(n + alpha, n) / g_n, with
    g_n^2 = Gamma(n+alpha+1) / Gamma(n+1), c = beta^{(1-alpha)/2} Gamma(1-alpha)^{-1/2}.
    With alpha = 0, A tends to that of `lagt` for beta to 0."""
    g, c = laguerre_scales(N, alpha, beta)
    A = -np.tril(g / g[:, None], -1) - 0.5 * (1 + beta) * np.eye(N)
    return A, c * scipy.special.binom(np.arange(N) + alpha, np.arange(N)) / g


def foud(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Decaying Fourier modes. A = 2 pi S - I/2, B = g (`_rotation`); normal."""
    S, g = _rotation(N)
    return 2 * np.pi * S - 0.5 * np.eye(N), g


def fout(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Truncated Fourier, HiPPO-FouT. A = pi S - g g^T, B = g. A sliding window of 2."""
    S, g = _rotation(N)
    return np.pi * S - np.outer(g, g), g


def fourier2(N: int) -> tuple[np.ndarray, np.ndarray]:
    """`fout` twice as fast: A = 2 pi S - 2 g g^T, B = 2 g. A sliding window of 1."""
    A, B = fout(N)
    return 2 * A, 2 * B


def fourier_decay(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Fourier modes over windows of 2, each window weighted by a third of the one after
    it: A = pi S - g g^T / 2, B = g / 2."""
    S, g = _rotation(N)
    return np.pi * S - 0.5 * np.outer(g, g), 0.5 * g


def chebt(N: int, theta: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Translated Chebyshev: d/dt of T_n(1 - 2t/theta) in its own basis,
    A_nk = -4n/theta for k < n, n - k odd, half of that for k = 0; B = 1.
    Nilpotent, so kernels grow like t^n: for analysis, never to initialise a layer."""
    _positive("theta", theta)
    n = np.arange(N)
    odd = (n[:, None] - n) % 2
    A = -4.0 / theta * np.tril(n[:, None] * odd, -1)
    A[:, 0] *= 0.5
    return A, np.ones(N)


def random(N: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A ~ N(0, 1) / N, B ~ N(0, 1), for comparison."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((N, N)) / N, draw.standard_normal(N)


def diagonal(N: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A = -diag(exp N(0, 1)), B ~ N(0, 1), for comparison."""
    draw = np.random.default_rng(seed)
    return -np.diag(np.exp(draw.standard_normal(N))), draw.standard_normal(N)


def _rotation(N):
    """S [N, N] and g [N] of the Fourier measures, states (cos_0, sin_0, cos_1, ...).

    S turns pair m with angular speed m; g is 1, then sqrt(2), on the cosines. sin_0 is
    a place-holder that stays 0.
    """
    _check_size(N, even=True)
    m = np.arange(N // 2, dtype=np.float64)
    S, g = np.zeros((N, N)), np.zeros(N)
    S[1::2, ::2] = np.diag(m)
    S[::2, 1::2] = -np.diag(m)
    g[::2] = np.where(m > 0, np.sqrt(2.0), 1.0)
    return S, g


def laguerre_scales(N: int, alpha: float, beta: float) -> np.ndarray:
    """g [N] and c of `glagt`."""
    if not -1 < alpha < 1:
        raise ValueError(f"alpha: must be between -1 and 1, got {alpha}")
    _positive("beta", beta)
    n = np.arange(N)
    log_square = scipy.special.gammaln(n + alpha + 1) - scipy.special.gammaln(n + 1)
    c = np.sqrt(beta ** (1 - alpha) / scipy.special.gamma(1 - alpha))
    return np.exp(0.5 * log_square), c


def _positive(name, value):
    if not value > 0:
        raise ValueError(f"{name}: must be positive, got {value}")


def _check_size(N, even=False):
    if N < 1 or (even and N % 2):
        raise ValueError(
            f"N: the state size must be {'even' if even else 'at least 1'}, got {N}"
        )


MEASURES = {
    "legs": legs,
    "legsd": legsd,
    "legt": legt,
    "lmu": lmu,
    "lagt": lagt,
    "tlagt": tlagt,
    "glagt": glagt,
    "foud": foud,
    "fout": fout,
    "fourier2": fourier2,
    "fourier_decay": fourier_decay,
    "chebt": chebt,
    "random": random,
    "diagonal": diagonal,
}

# The names on the right are those of the S4 code. It also calls its fout "fourier" and
# its foud "fourier_diag". Some JAX ports of HiPPO call this fout "fru", this fourier2
# "fout" and this fourier_decay "fourd"; here "fout" keeps its meaning in S4. The
# Fourier recurrent unit itself (https://arxiv.org/abs/1803.06585) has undamped modes,
# A = 2 pi S, and is none of these.
ALIASES = {
    "fourier": "fout",
    "fourier_diag": "foud",
    "fru": "fout",
    "fourd": "fourier_decay",
}


def resolve(measure: str) -> str:
    """The name in MEASURES that `measure` stands for; `ValueError` if there is none."""
    name = ALIASES.get(measure, measure)
    if name not in MEASURES:
        raise ValueError(
            f"measure: must be one of {sorted({*MEASURES, *ALIASES})}, got {measure!r}"
        )
    return name


def own_arguments(measure: str, **arguments: dict) -> dict:
    """Those of the arguments that are not None; `ValueError` for one that the measure
    does not take."""
    takes = [*inspect.signature(MEASURES[resolve(measure)]).parameters][1:]
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name, value in arguments.items():
        if name not in takes:
            raise ValueError(
                f"{name}: must be left out for {measure!r}, which takes "
                f"{takes or 'no arguments'}, got {value}"
            )
    return arguments


def transition(
    measure: str,
    N: int,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    theta: float | None = None,
    seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A [N, N] and B [N] of a measure, float64.

    alpha and beta are those of the Laguerre measures, theta that of `chebt`, seed that
    of `random` and `diagonal`; None is the measure's own default. `ValueError` for an
    unknown measure, an argument it does not take, or an odd N where it needs an even
    one (the Fourier measures).
    """
    name = resolve(measure)
    _check_size(N)
    arguments = own_arguments(name, alpha=alpha, beta=beta, theta=theta, seed=seed)
    return MEASURES[name](N, **arguments)


def legs_low_rank(N: int) -> np.ndarray:
    """P [N], P_n = sqrt(n + 1/2): A_legs + P P^T is normal, skew minus I/2."""
    return np.sqrt(np.arange(N, dtype=np.float64) + 0.5)


def legt_low_rank(N: int) -> np.ndarray:
    """P [2, N], r_n / sqrt(2) on odd n and on even n: A_legt + sum P P^T is skew."""
    n = np.arange(N)
    return np.stack([n % 2 == 1, n % 2 == 0]) * np.sqrt(n + 0.5)


def fourier_low_rank(N: int) -> np.ndarray:
    """P [1, N] = g: A_fout + P P^T = pi S."""
    return _rotation(N)[1][None]


# P [rank, N] such that A + sum_r P_r P_r^T = c I + skew.
LOW_RANK = {
    "legs": lambda N: legs_low_rank(N)[None],
    "legsd": lambda N: np.zeros((0, N)),
    "legt": legt_low_rank,
    "lagt": lambda N: np.full((1, N), np.sqrt(0.5)),
    "tlagt": lambda N: np.full((1, N), np.sqrt(0.5)),
    "glagt": lambda N: np.full((1, N), np.sqrt(0.5)),
    "foud": lambda N: np.zeros((0, N)),
    "fout": fourier_low_rank,
    "fourier2": lambda N: np.sqrt(2.0) * fourier_low_rank(N),
    "fourier_decay": lambda N: np.sqrt(0.5) * fourier_low_rank(N),
}
WITHOUT_LOW_RANK = {
    "lmu": "it is similar to 2 legt by a matrix that is not orthogonal; take 'legt' "
    "with twice the step",
    "chebt": "its A is nilpotent and its kernels grow without bound",
    "random": "a random A has none",
    "diagonal": "its A is diagonal already, with real eigenvalues that form no pairs",
}


def nplr(
    measure: str, N: int, rank: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The normal plus low-rank form of a measure with its default arguments.

    A + sum_r P_r P_r^T = c I + skew = V diag(lam) V*, of which the half with negative
    imaginary parts is kept (of a pair of zeros, one). With v the kept half of V,

        A = 2 Re(v diag(lam) v*) - sum_r P_r P_r^T,  P_r = 2 Re(v p_r),  B = 2 Re(v b).

    Returns lam [N/2], p = v* P [rank, N/2], b = v* B [N/2] and v [N, N/2], complex128.
    The eigenvectors have the phases that make b real and not negative, so that lam, p
    and b do not depend on the linear-algebra library.

    P has rank 2 for `legt`, 0 for `legsd` and `foud`, else 1; rows of zeros are added
    up to `rank`, at most 3. `ValueError` for a smaller rank, an odd N, or a measure
    without this form. `glagt` has it for its default alpha = 0 only: otherwise g_k/g_n
    makes the symmetric part of A a matrix of full rank.
    """
    name = resolve(measure)
    if name not in LOW_RANK:
        raise ValueError(
            f"measure: must be one of {sorted(LOW_RANK)}, got {measure!r}, which has "
            f"no normal plus low-rank form: {WITHOUT_LOW_RANK[name]}"
        )
    _check_size(N, even=True)
    P = LOW_RANK[name](N)
    if not max(1, len(P)) <= rank <= 3:
        raise ValueError(
            f"rank: must be {max(1, len(P))} to 3 for {measure!r}, got {rank}"
        )
    P = np.concatenate([P, np.zeros((rank - len(P), N))])
    A, B = MEASURES[name](N)
    lam, V = normal_eigenpairs(A + P.T @ P)
    b = V.conj().T @ B
    V = V * np.exp(1j * np.angle(b))
    return lam, P @ V.conj(), V.conj().T @ B, V


def normal_eigenpairs(A_normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenpairs of a real matrix c I + skew, for an even size N.

    Returns lam [N/2] complex128, the half with negative imaginary parts in ascending
    order, and V [N, N/2] complex128 with orthonormal columns: A = 2 Re(V diag(lam) V*).
    The Hermitian problem of -i (A - c I) is solved, never the general one: that would
    neither order nor pair the eigenvalues reliably.

    A null space of the skew part, of even dimension, has no negative half; of a real
    basis (a, a') of it (a + i a') / sqrt(2) is kept, whose conjugate is the other half.
    """
    N = len(A_normal)
    if N % 2:
        raise ValueError(f"N: the state size must be even, got {N}")
    c = np.mean(np.diag(A_normal))
    omega, V = np.linalg.eigh(-1j * (A_normal - c * np.eye(N)))
    null = np.abs(omega) <= 1e-12 * np.abs(omega).max()
    if null.any():
        real = np.linalg.eigh((V[:, null] @ V[:, null].conj().T).real)[1]
        first, second = np.split(real[:, -null.sum() :], 2, axis=1)
        half = (first + 1j * second) / np.sqrt(2)
        V[:, null] = np.concatenate([half, half.conj()], axis=1)
        omega[null] = 0.0
    return c + 1j * omega[: N // 2], V[:, : N // 2]


def hippo_n(N: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-N: eigenpairs of the normal part of LegS, A_legs + P P^T (N even)."""
    A, _ = legs(N)
    P = legs_low_rank(N)
    return normal_eigenpairs(A + np.outer(P, P))
