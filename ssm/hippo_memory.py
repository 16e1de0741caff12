"""What a HiPPO state remembers: its kernels, and the past read back. NumPy float64.

The state of a measure (`ssm.hippo`) weighs the past by K_n(t) = p_n(t) w(t), t >= 0 the
time ago, and the past is read back as u(now - t) ~ sum_n x_n p_n(t). With r_n =
sqrt(2n + 1), P_n the Legendre and L_n the Laguerre polynomials, and phi_n(a) = 1, 0,
sqrt(2) cos(a), sqrt(2) sin(a), sqrt(2) cos(2a), ...:

    measure        p_n(t)                             w(t)                 for t in
    legs, legsd    r_n P_n(2 e^{-t} - 1)              e^{-t}               [0, inf)
    legt           r_n P_n(1 - t)                     1/2                  [0, 2]
    lmu            P_n(2t - 1)                        2n + 1               [0, 1]
    lagt           e^{-t/2} L_n(t) / beta             beta^2               [0, inf)
    tlagt          e^{-(1-beta)t/2} L_n(t) / beta     beta^2 e^{-beta t}   [0, inf)
    glagt          t^a e^{-(1-beta)t/2} L_n^a(t)      t^-a e^{-beta t}     [0, inf)
                     / (g_n c)                          c^2, a = alpha
    fout           phi_n(pi t)                        1/2                  [0, 2]
    fourier2       phi_n(2 pi t)                      1                    [0, 1]
    foud           phi_n(2 pi t)                      e^{-t/2}             [0, inf)
    fourier_decay  phi_n(pi t)                        3^{-floor(t/2)-1}    [0, inf)
    chebt          T_n(1 - 2t/theta)                  1                    [0, inf)

K is exactly e^{tA} B for legs, the three Laguerre measures, foud and chebt. For the
others it is the limit for N to infinity: they learn what leaves their window from their
own reconstruction of it. The last three rows read nothing back (`reconstruct`).
"""

import numpy as np
import scipy.linalg
import scipy.special

from ssm import hippo


def legendre(N: int, y: np.ndarray) -> np.ndarray:
    """r_n P_n(y) [N, T], orthonormal on [-1, 1] under the weight 1/2."""
    r = np.sqrt(2 * np.arange(N) + 1.0)
    return np.polynomial.legendre.legvander(y, N - 1).T * r[:, None]


def fourier(N: int, angle: np.ndarray) -> np.ndarray:
    """phi_n(angle) [N, T], N even: the basis of the Fourier measures."""
    if N % 2:
        raise ValueError(f"N: the state size must be even, got {N}")
    m = np.arange(N // 2)[:, None]
    pairs = np.stack([np.cos(m * angle), np.sin(m * angle)], axis=1)
    scale = np.where(m > 0, np.sqrt(2.0), 1.0)
    return (scale[:, None] * pairs).reshape(N, -1)


def _laguerre(N, t, alpha=0.0):
    return scipy.special.eval_genlaguerre(np.arange(N)[:, None], alpha, t)


def _legs(N, t):
    return legendre(N, 2 * np.exp(-t) - 1), np.exp(-t), 1.0


def _legt(N, t):
    return legendre(N, 1 - t), 0.5, 1.0


def _lmu(N, t):
    square = 2 * np.arange(N)[:, None] + 1.0
    return legendre(N, 2 * t - 1) / np.sqrt(square), square, 1.0


def _lagt(N, t, beta=1.0):
    return _laguerre(N, t) * np.exp(-t / 2), beta, 1 / beta


def _tlagt(N, t, beta=1.0):
    k = beta * np.exp(-0.5 * (1 + beta) * t)
    return _laguerre(N, t), k, np.exp(-0.5 * (1 - beta) * t) / beta


def _glagt(N, t, alpha=0.0, beta=0.01):
    g, c = hippo.laguerre_scales(N, alpha, beta)
    k = c * np.exp(-0.5 * (1 + beta) * t)
    with np.errstate(divide="ignore"):  # infinite at t = 0 for a negative alpha
        f = t**alpha * np.exp(-0.5 * (1 - beta) * t) / c
    return _laguerre(N, t, alpha) / g[:, None], k, f


def _foud(N, t):
    return fourier(N, 2 * np.pi * t), np.exp(-t / 2), None


def _fout(N, t):
    return fourier(N, np.pi * t), 0.5, 1.0


def _fourier2(N, t):
    return fourier(N, 2 * np.pi * t), 1.0, 1.0


def _fourier_decay(N, t):
    return fourier(N, np.pi * t), 3.0 ** -(np.floor(t / 2) + 1), None


def _chebt(N, t, theta=1.0):
    n = np.arange(N)[:, None]
    return scipy.special.eval_chebyt(n, 1 - 2 * t / theta), 1.0, None


# q [N, T], k and f of each measure, with K_n = q_n k and p_n = q_n f, so w = k / f; f
# is None where nothing is read back.
EXPANSIONS = {
    "legs": _legs,
    "legsd": _legs,
    "legt": _legt,
    "lmu": _lmu,
    "lagt": _lagt,
    "tlagt": _tlagt,
    "glagt": _glagt,
    "foud": _foud,
    "fout": _fout,
    "fourier2": _fourier2,
    "fourier_decay": _fourier_decay,
    "chebt": _chebt,
}
WINDOWS = {"legt": 2.0, "lmu": 1.0, "fout": 2.0, "fourier2": 1.0}
FORGETFUL = {
    "foud": "its kernels are periodic but for a decay, so that it only knows the sum "
    "of all windows of the past",
    "fourier_decay": "its kernels are periodic but for a decay, so that it only knows "
    "the sum of all windows of the past",
    "chebt": "its kernels grow without bound, so that the oldest input drowns the rest",
    "random": "its kernels are no basis",
    "diagonal": "its kernels are no basis",
}


def basis(
    measure: str,
    N: int,
    t: np.ndarray,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    theta: float | None = None,
) -> np.ndarray:
    """The kernels K_n(t) [N, T] = e^{tA} B at the times t [T] >= 0, in closed form.

    0 outside the window of `legt`, `lmu`, `fout` and `fourier2`. See the top of this
    file for what is exact. `ValueError` for `random` and `diagonal`, a negative time,
    or an argument that the measure does not take.
    """
    name = hippo.resolve(measure)
    if name not in EXPANSIONS:
        raise ValueError(
            f"measure: must be one of {sorted(EXPANSIONS)}, got {measure!r}, which has "
            "no closed basis"
        )
    arguments = hippo.own_arguments(name, alpha=alpha, beta=beta, theta=theta)
    t = _times(t)
    window = WINDOWS.get(name, np.inf)
    q, k, _ = EXPANSIONS[name](N, np.minimum(t, window), **arguments)
    return np.where(t <= window, q * k, 0.0)


def reconstruct(
    measure: str,
    x: np.ndarray,
    t: np.ndarray,
    *,
    alpha: float | None = None,
    beta: float | None = None,
) -> np.ndarray:
    """The past u(now - t) [..., T] from states x [..., N]: sum_n x_n p_n(t).

    The best fit under the weight w, at times ago t [T] within the window; the table at
    the top of this file has p, w and windows. The fit is global under w: where w is
    small it is loose. `ValueError` for a time outside the window and for measures that
    cannot tell one past from another: foud, fourier_decay, chebt, random, diagonal.
    """
    name = hippo.resolve(measure)
    if name in FORGETFUL:
        allowed = sorted(set(EXPANSIONS) - set(FORGETFUL))
        raise ValueError(
            f"measure: must be one of {allowed}, got {measure!r}, which has no "
            f"reconstruction: {FORGETFUL[name]}"
        )
    arguments = hippo.own_arguments(name, alpha=alpha, beta=beta)
    x = np.asarray(x, np.float64)
    t = _times(t, WINDOWS.get(name, np.inf))
    q, _, f = EXPANSIONS[name](x.shape[-1], t, **arguments)
    return x @ (q * f)


def _times(t, window=np.inf):
    t = np.atleast_1d(np.asarray(t, np.float64))
    if t.size and not (t.min() >= 0 and t.max() <= window):
        raise ValueError(
            f"t: times ago must be in [0, {window}], got {t.min()} to {t.max()}"
        )
    return t


def legs_memory(
    u: np.ndarray, N: int, discretization: str = "bilinear", last: bool = False
) -> np.ndarray:
    """The time-varying LegS memory x' = (A x + B u) / t, which remembers all of its
    past on one scale: its window is the time gone by, and there is no step size.

    Tokens u [..., L] are held over (k-1, k]; from the exact x_1 = (u_1, 0, ...) a token
    moves the state from time t to t + 1, with A_t = A / t and B_t = B / t:

        forward    x + A_t x + B_t u
        backward   (I - A_t)^{-1} (x + B_t u)
        bilinear   (I - A_t/2)^{-1} (x + A_t x / 2 + B_t u)
        zoh        e^{A ln((t+1)/t)} x + A^{-1} (e^{A ln((t+1)/t)} - I) B u

    zoh is exact for the held input. forward passes through about 2^N before it settles,
    so it needs a small N. Returns the states [..., L, N], or with
    `last` the last one [..., N]. `ValueError` for an unknown discretisation or no
    token. Source: https://arxiv.org/abs/2008.07669, section 3.
    """
    u = np.asarray(u, np.float64)
    if discretization not in STEPS:
        raise ValueError(
            f"discretization: must be one of {sorted(STEPS)}, got {discretization!r}"
        )
    if u.ndim == 0 or u.shape[-1] == 0:
        raise ValueError(f"u: must be [..., L >= 1], got shape {u.shape}")
    step = STEPS[discretization](N)
    flat = u.reshape(-1, u.shape[-1])
    x = np.zeros((len(flat), N))
    x[:, 0] = flat[:, 0]
    states = [x]
    for t in range(1, flat.shape[1]):
        x = step(x, flat[:, t : t + 1], t)
        if not last:
            states.append(x)
    if last:
        return x.reshape(*u.shape[:-1], N)
    return np.stack(states, axis=1).reshape(*u.shape, N)


def _gbt(alpha):
    """The generalised bilinear step: alpha 0 is forward, 1/2 bilinear, 1 backward."""

    def prepare(N):
        A, B = hippo.legs(N)
        identity = np.eye(N)

        def step(x, u, t):
            right = x + (x @ A.T * (1 - alpha) + B * u) / t
            left = identity - alpha / t * A
            return scipy.linalg.solve_triangular(left, right.T, lower=True).T

        return step

    return prepare


def _zoh(N):
    """The exact step, without an exponential: the past is squeezed from [0, 1] into
    [0, rho], rho = t / (t + 1), where quadrature of degree 2N - 1 projects it exactly,
    and u fills the rest: u e_0 + e^{A ln(1/rho)} (x - u e_0), since A^{-1} B = -e_0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(N)
    nodes, weights = 0.5 * (nodes + 1), 0.5 * weights
    values = legendre(N, 2 * nodes - 1)

    def step(x, u, t):
        rho = t / (t + 1)
        constant = u * np.eye(1, N)
        past = (x - constant) @ values * weights * rho
        return constant + past @ legendre(N, 2 * rho * nodes - 1).T

    return step


STEPS = {
    "forward": _gbt(0.0),
    "backward": _gbt(1.0),
    "bilinear": _gbt(0.5),
    "zoh": _zoh,
}


def reconstruct_legs_memory(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The past at the fractions s [T] of the time gone by, 0 its start and 1 now:
    sum_n x_n r_n P_n(2s - 1) [..., T] from states x [..., N] of `legs_memory`; the best
    fit under equal weight. `ValueError` for s outside [0, 1]."""
    s = np.atleast_1d(np.asarray(s, np.float64))
    if s.size and not (s.min() >= 0 and s.max() <= 1):
        raise ValueError(f"s: fractions must be in [0, 1], got {s.min()} to {s.max()}")
    x = np.asarray(x, np.float64)
    return x @ legendre(x.shape[-1], 2 * s - 1)
