"""HiPPO measures against matrix exponentials, quadrature and special functions."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from numpy.polynomial import Legendre

from kernels.tolerance import assert_close, error
from ssm import discretize, hippo, hippo_memory

FOURIER = ["foud", "fout", "fourier2", "fourier_decay"]
TIMES = np.array([0.0, 0.3, 0.9, 1.4, 1.9, 2.7, 5.1])


def rows(f, N):
    return np.stack([f(n) * np.ones_like(TIMES) for n in range(N)])


def wave(n, angle):
    """1, 0, sqrt(2) cos(angle), sqrt(2) sin(angle), ..."""
    function = np.sin if n % 2 else np.cos
    return (np.sqrt(2) if n > 1 else 1.0) * function(n // 2 * angle)


def published(t):
    """Kernels that hold exactly, by measure and arguments, as functions of n."""
    exp, sp = np.exp, scipy.special
    a, b = 0.3, 0.5
    c = np.sqrt(b ** (1 - a) / sp.gamma(1 - a))
    return [
        ("legs", {}, lambda n: (2 * n + 1) ** 0.5 * sp.eval_legendre(n, 2 * exp(-t) - 1)
         * exp(-t)),
        ("lagt", {}, lambda n: sp.eval_laguerre(n, t) * exp(-t / 2)),
        ("lagt", {"beta": b}, lambda n: b * sp.eval_laguerre(n, t) * exp(-t / 2)),
        ("tlagt", {}, lambda n: sp.eval_laguerre(n, t) * exp(-t)),
        ("tlagt", {"beta": b}, lambda n: b * sp.eval_laguerre(n, t) * exp(-0.75 * t)),
        ("glagt", {}, lambda n: 0.1 * sp.eval_laguerre(n, t) * exp(-0.505 * t)),
        ("glagt", {"alpha": a, "beta": b}, lambda n: c * exp(-0.75 * t)
         * sp.eval_genlaguerre(n, a, t) / np.sqrt(sp.poch(n + 1, a))),
        ("foud", {}, lambda n: wave(n, 2 * np.pi * t) * exp(-t / 2)),
        ("chebt", {}, lambda n: sp.eval_chebyt(n, 1 - 2 * t)),
        ("chebt", {"theta": 2.0}, lambda n: sp.eval_chebyt(n, 1 - t)),
    ]  # fmt: skip


EXACT = published(TIMES)


@pytest.mark.parametrize(
    "measure, own, kernel", EXACT, ids=[f"{m}-{sorted(own)}" for m, own, _ in EXACT]
)
def test_exact_kernels_are_the_matrix_exponential(measure, own, kernel):
    # Some SciPy releases lose digits of expm for larger nilpotent matrices.
    N = 8 if measure == "chebt" else 16
    A, B = hippo.transition(measure, N, **own)
    assert A.shape == (N, N) and B.shape == (N,) and A.dtype == B.dtype == np.float64
    exponential = np.stack([scipy.linalg.expm(t * A) @ B for t in TIMES], axis=1)
    found = hippo_memory.basis(measure, N, TIMES, **own)
    assert error(found, exponential) < 1e-11
    assert_close(found, rows(kernel, N))


@pytest.mark.parametrize("measure", ["legt", "lmu", "fout", "fourier2"])
def test_windowed_kernels_tend_to_their_basis_and_forget(measure):
    """The mean square error of K_0..K_4 over 1.5 windows falls at least like N^-0.8."""
    window = hippo_memory.WINDOWS[measure]
    dt = window / 200
    errors = []
    for N in (16, 64):
        A, B = hippo.transition(measure, N)
        step = scipy.linalg.expm(A * dt)
        x = scipy.linalg.expm(A * dt / 2) @ B
        states = [x] + [x := step @ x for _ in range(299)]
        expected = hippo_memory.basis(measure, N, dt * (np.arange(300) + 0.5))
        assert not expected[:, 200:].any()
        gap, scale = np.stack(states, 1)[:5] - expected[:5], expected[:5]
        errors.append(np.mean(gap**2) / np.mean(scale**2))
    assert errors[0] < 0.15 and errors[1] < errors[0] / 3


def test_fourier_decay_loses_two_thirds_per_window():
    A, B = hippo.transition("fourier_decay", 128)
    t = np.array([0.5, 1.3, 2.5, 3.3, 4.5])
    exponential = np.stack([scipy.linalg.expm(s * A) @ B for s in t], axis=1)
    found = hippo_memory.basis("fourier_decay", 128, t)
    assert error(exponential[:8], found[:8]) < 0.03
    assert_close(found[:, 2:4], found[:, :2] / 3)


def test_legsd_answers_slow_inputs_as_legs():
    """Its kernels converge weakly: the responses to e^{iwt} of bounded w do, like 1/N,
    though e^{tA} B at one t is off by tens of per cent."""
    gaps = []
    for N in (32, 256):
        responses = []
        for measure in ("legs", "legsd"):
            A, B = hippo.transition(measure, N)
            shifted = [1j * w * np.eye(N) - A for w in (0.5, 2.0)]
            responses.append(np.stack([np.linalg.solve(m, B)[:4] for m in shifted]))
        gaps.append(error(responses[1], responses[0]))
    assert gaps[0] < 0.08 and gaps[1] < gaps[0] / 6


def quadrature(polynomials, t, w):
    """A and B of a sliding window [0, theta], from d/dt int p_n(s) w u(t - s) ds with
    what leaves the window read from the reconstruction."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    s = 0.5 * t * (nodes + 1)
    slope = np.stack([w[n] * p.deriv()(s) for n, p in enumerate(polynomials)])
    values = np.stack([p(s) for p in polynomials])
    start, end = (np.array([p(x) for p in polynomials]) for x in (0.0, t))
    A = (slope * weights * 0.5 * t) @ values.T - np.outer(w * end, end)
    return A, w * start


def test_legt_and_lmu_follow_from_their_bases():
    N = 9
    n = np.arange(N)
    one = [Legendre.basis(k, domain=[0, 2]) for k in n]
    legt = [(-1.0) ** k * np.sqrt(2 * k + 1) * p for k, p in zip(n, one, strict=True)]
    found = quadrature(legt, 2.0, np.full(N, 0.5))
    assert_close(hippo.transition("legt", N), found)
    lmu = [Legendre.basis(k, domain=[0, 1]) for k in n]
    found = quadrature(lmu, 1.0, 2.0 * n + 1)
    assert_close(hippo.transition("lmu", N), found)


def test_lmu_is_similar_to_legt_at_twice_the_speed():
    A, B = hippo.lmu(8)
    legt_A, legt_B = hippo.legt(8)
    n = np.arange(8)
    T = (-1.0) ** n / np.sqrt(2 * n + 1)
    assert_close(T[:, None] * A / T, 2 * legt_A)
    assert_close(T * B, 2 * legt_B)


def test_fourier_measures_have_the_published_entries():
    r, pi = np.sqrt(2), np.pi
    S = np.zeros((4, 4))
    S[2, 3], S[3, 2] = -1, 1
    g = np.array([1, 0, r, 0])
    gg = np.array([[1, 0, r, 0], [0, 0, 0, 0], [r, 0, 2, 0], [0, 0, 0, 0]])
    expected = {
        "foud": (2 * pi * S - np.eye(4) / 2, g),
        "fout": (pi * S - gg, g),
        "fourier2": (2 * pi * S - 2 * gg, 2 * g),
        "fourier_decay": (pi * S - gg / 2, g / 2),
    }
    for measure, system in expected.items():
        assert_close(hippo.transition(measure, 4), system)


def test_glagt_tends_to_lagt():
    A, _ = hippo.transition("lagt", 8)
    assert error(hippo.transition("glagt", 8, beta=1e-8)[0], A) < 1e-8
    assert error(hippo.transition("glagt", 8, beta=1e-8, alpha=0.2)[0], A) > 0.01


@pytest.mark.parametrize(
    "measure",
    ["legs", "legsd", "legt", "lmu", "tlagt", "fout", "fourier2", "fourier_decay"],
)
def test_a_constant_input_is_a_fixed_point(measure):
    A, B = hippo.transition(measure, 12)
    assert_close(A[:, 0], -B)


@pytest.mark.parametrize("measure", ["random", "diagonal"])
def test_random_systems_follow_their_seed(measure):
    first, again = (hippo.transition(measure, 6, seed=3) for _ in range(2))
    other = hippo.transition(measure, 6, seed=4)
    assert_close(first, again)
    assert error(first[0], other[0]) > 0.01
    if measure == "diagonal":
        assert np.all(np.diag(first[0]) < 0)
        assert_close(first[0], np.diag(np.diag(first[0])))


def test_aliases_name_measures():
    for alias, name in hippo.ALIASES.items():
        assert name in hippo.MEASURES
        assert_close(hippo.transition(alias, 6), hippo.transition(name, 6))
        assert_close(
            hippo_memory.basis(alias, 6, TIMES), hippo_memory.basis(name, 6, TIMES)
        )


@pytest.mark.parametrize("N", [2, 8, 64])
@pytest.mark.parametrize("measure", hippo.LOW_RANK)
def test_nplr_rebuilds_the_measure(measure, N):
    A, B = hippo.transition(measure, N)
    need = 2 if measure == "legt" else 1
    first = None
    for rank in range(need, 4):
        lam, P, b, V = hippo.nplr(measure, N, rank)
        assert lam.shape == b.shape == (N // 2,)
        assert P.shape == (rank, N // 2) and V.shape == (N, N // 2)
        assert all(x.dtype == np.complex128 for x in (lam, P, b, V))
        real_P = 2 * (P @ V.T).real
        assert_close(2 * (V * lam @ V.conj().T).real - real_P.T @ real_P, A)
        assert_close(2 * (V @ b).real, B)
        both = np.concatenate([V, V.conj()], axis=1)
        assert_close(both @ both.conj().T, np.eye(N).astype(complex))
        assert np.all(lam.imag <= 0) and np.all(np.diff(lam.imag) > 0)
        assert np.all(b.real > 0) and np.abs(b.imag).max() < 1e-12 * np.abs(b).max()
        assert not P[need:].any()
        first = P[:need] if first is None else first
        assert_close(P[:need], first)


@pytest.mark.parametrize("measure", hippo.LOW_RANK)
def test_nplr_has_the_eigenvalues_of_the_normal_part(measure):
    N = 12
    A, _ = hippo.transition(measure, N)
    lam, P, _, V = hippo.nplr(measure, N, 3)
    real_P = 2 * (P @ V.T).real
    both = np.concatenate([lam, lam.conj()])
    expected = np.linalg.eigvals(A + real_P.T @ real_P)
    assert_close(np.sort(both.imag), np.sort(expected.imag), dtype="float64")
    assert np.ptp(lam.real) < 1e-12
    if measure in FOURIER:
        assert lam[-1].imag == 0.0
        assert_close(np.abs(V[:, -1]), np.eye(N)[:2].sum(0) / np.sqrt(2))


def test_hippo_n_is_the_normal_part_of_legs():
    lam, V = hippo.hippo_n(8)
    again, _, b, turned = hippo.nplr("legs", 8)
    assert_close(again, lam)
    assert_close(np.abs(V.conj().T @ turned), np.eye(4))
    assert_close(b.real, np.abs(V.conj().T @ hippo.legs(8)[1]))


def fading(t):
    return np.exp(-t) * (1 + 3 * t) * np.cos(2 * t)


def tilted(t):
    return t**0.3 * fading(t)


def steady(t):
    return 0.4 + np.sin(2 * t + 1) + 0.3 * t


def periodic(t):
    """Smooth where it leaves a window of 1 or 2, and larger the older."""
    return np.sin(np.pi * t) ** 2 * (0.5 + t)


def remember(measure, N, history, span, dt, **own):
    """The state after `span`, its input being history(time ago), by the dense ZOH."""
    A, B = hippo.transition(measure, N, **own)
    A, B = discretize.dense_zoh(A, B, dt)
    x = np.zeros(N)
    for k in range(round(span / dt)):
        x = A @ x + B * history(span - (k + 0.5) * dt)
    return x


LATE = np.linspace(0.1, 4, 12)


@pytest.mark.parametrize(
    "measure, own, N, history, times, bound",
    [
        ("legs", {}, 64, fading, LATE, 1e-3),
        ("legsd", {}, 64, fading, LATE, 1e-3),
        ("legt", {}, 16, steady, np.linspace(0, 2, 12), 2e-4),
        ("lmu", {}, 16, steady, np.linspace(0, 1, 12), 2e-4),
        ("lagt", {}, 64, fading, LATE, 1e-4),
        ("lagt", {"beta": 0.5}, 64, fading, LATE, 1e-4),
        ("tlagt", {}, 64, fading, LATE, 1e-4),
        ("tlagt", {"beta": 0.4}, 64, fading, LATE, 1e-4),
        ("glagt", {}, 64, fading, LATE, 1e-4),
        ("glagt", {"alpha": 0.3, "beta": 0.5}, 64, tilted, LATE, 1e-3),
        ("fout", {}, 64, periodic, np.linspace(0, 2, 12), 2e-2),
        ("fourier2", {}, 64, periodic, np.linspace(0, 1, 12), 2e-2),
    ],
)
def test_the_past_is_read_back(measure, own, N, history, times, bound):
    span, dt = (30, 5e-3) if history in (fading, tilted) else (6, 2e-3)
    x = remember(measure, N, history, span, dt, **own)
    found = hippo_memory.reconstruct(measure, np.stack([x, -2 * x]), times, **own)
    assert found.shape == (2, len(times))
    assert error(found[0], history(times)) < bound
    assert_close(found[1], -2 * found[0])


@pytest.mark.parametrize("N", [1, 7, 32])
def test_zoh_memory_is_the_projection_of_its_held_input(N):
    """x_n = int_0^1 u(s) r_n P_n(2s - 1) ds of the staircase, at every length."""
    u = np.random.default_rng(0).standard_normal((2, 40))
    states = hippo_memory.legs_memory(u, N, "zoh")
    assert states.shape == (2, 40, N)
    for length in (1, 2, 13, 40):
        edges = np.linspace(0, 1, length + 1)
        p = [np.sqrt(2 * n + 1) * Legendre.basis(n, domain=[0, 1]) for n in range(N)]
        integrals = np.stack([np.diff(q.integ()(edges)) for q in p], axis=1)
        assert_close(states[:, length - 1], u[:, :length] @ integrals)


@pytest.mark.parametrize("name", hippo_memory.STEPS)
def test_memory_steps_are_the_dense_rules(name):
    N = 6
    A, B = hippo.legs(N)
    u = np.random.default_rng(1).standard_normal(9)
    alpha = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}
    x = u[0] * np.eye(N)[0]
    for t in range(1, len(u)):
        if name == "zoh":
            a, b = discretize.dense_zoh(A, B, np.log((t + 1) / t))
        else:
            a, b = discretize.dense_gbt(A, B, 1 / t, alpha[name])
        x = a @ x + b * u[t]
    last = hippo_memory.legs_memory(u, N, name, last=True)
    assert_close(last, x)
    assert_close(hippo_memory.legs_memory(u, N, name)[-1], last)


def signal(s):
    return np.sin(5 * s) + 0.5 * np.cos(9 * s + 1) + 0.3 * s


@pytest.mark.parametrize("name", hippo_memory.STEPS)
def test_dense_sampling_makes_all_discretisations_agree(name):
    """To the projection of the signal itself: first order, zoh second."""
    N = 8
    s, weights = np.polynomial.legendre.leggauss(64)
    exact = (signal(0.5 * (s + 1)) * weights / 2) @ hippo_memory.legendre(N, s).T
    gaps = []
    for L in (200, 800):
        u = signal((np.arange(L) + 0.5) / L)
        gaps.append(error(hippo_memory.legs_memory(u, N, name, last=True), exact))
    assert gaps[0] < 0.1 and gaps[1] < gaps[0] / (12 if name == "zoh" else 2.5)


@pytest.mark.parametrize("name", ["bilinear", "backward", "zoh"])
def test_memory_does_not_see_the_pace(name):
    """A signal played three times as slowly leaves the same state and reconstruction:
    exactly where the held input is followed exactly, else in the limit."""
    N, s = 12, np.linspace(0.05, 0.95, 7)
    gaps = []
    for L in (100, 400):
        u = signal((np.arange(L) + 0.5) / L)
        fast, slow = (
            hippo_memory.legs_memory(v, N, name, last=True)
            for v in (u, np.repeat(u, 3))
        )
        pasts = [hippo_memory.reconstruct_legs_memory(x, s) for x in (fast, slow)]
        gaps.append(error(*pasts))
    if name == "zoh":
        assert max(gaps) < 1e-11
    else:
        assert gaps[0] < 0.1 and gaps[1] < gaps[0] / 2.5


def test_memory_reads_its_whole_past_back():
    s = np.linspace(0, 1, 21)
    u = signal((np.arange(1000) + 0.5) / 1000)
    x = hippo_memory.legs_memory(u, 16, "zoh", last=True)
    assert error(hippo_memory.reconstruct_legs_memory(x, s), signal(s)) < 1e-4
    rough = hippo_memory.legs_memory(u, 4, "zoh", last=True)
    assert error(hippo_memory.reconstruct_legs_memory(rough, s), signal(s)) > 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hippo.transition("legz", 4), r"measure: must .*fru.*legs.*'legz'"),
        (lambda: hippo.transition("legs", 0), r"N: .*at least 1, got 0"),
        (lambda: hippo.transition("fout", 5), r"N: .*even, got 5"),
        (lambda: hippo.transition("legs", 4, beta=1.0), r"beta: must .* 1\.0"),
        (lambda: hippo.transition("lagt", 4, seed=1), r"seed: must .*'beta'.*got 1"),
        (lambda: hippo.transition("glagt", 4, alpha=1.0), r"alpha: .*-1 and 1, got 1"),
        (lambda: hippo.transition("glagt", 4, beta=0.0), r"beta: .*positive, got 0"),
        (lambda: hippo.transition("chebt", 4, theta=-1), r"theta: .*positive, got -1"),
        (lambda: hippo.nplr("legt", 8), r"rank: must be 2 to 3 for 'legt', got 1"),
        (lambda: hippo.nplr("legs", 8, 4), r"rank: must be 1 to 3 for 'legs', got 4"),
        (lambda: hippo.nplr("legs", 8, 0), r"rank: must be 1 to 3 for 'legs', got 0"),
        (lambda: hippo.nplr("legs", 7), r"N: .*even, got 7"),
        (lambda: hippo.nplr("lmu", 8), r"measure: .* 'lmu', .*similar to 2 legt"),
        (lambda: hippo.nplr("chebt", 8), r"measure: .*legs.* 'chebt', .*nilpotent"),
        (lambda: hippo.nplr("random", 8), r"measure: must .* 'random', .* no normal"),
        (lambda: hippo.nplr("diagonal", 8), r"measure: .* 'diagonal', .* no normal"),
        (lambda: hippo_memory.basis("random", 4, [0.0]), r"'random', .* no closed"),
        (lambda: hippo_memory.basis("legs", 4, [-1.0]), r"t: .*\[0, inf\], got -1"),
        (lambda: hippo_memory.basis("fru", 5, [0.0]), r"N: .*even, got 5"),
        (lambda: hippo_memory.basis("legs", 4, [0.0], beta=1.0), r"beta: must .* 1\.0"),
        (
            lambda: hippo_memory.reconstruct("legt", np.ones(4), [0.5, 2.5]),
            r"t: .*\[0, 2.0\], got 0.5 to 2.5",
        ),
        (lambda: hippo_memory.legs_memory([1.0], 4, "tustin"), r"bilinear.*'tustin'"),
        (lambda: hippo_memory.legs_memory([], 4), r"u: must be \[..., L >= 1\]"),
        (
            lambda: hippo_memory.reconstruct_legs_memory(np.ones(4), [1.5]),
            r"s: .*\[0, 1\], got 1.5",
        ),
    ],
)
def test_errors_name_the_argument_and_what_it_may_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "measure", ["foud", "fourier_decay", "chebt", "random", "diagonal"]
)
def test_measures_that_read_nothing_back_say_so(measure):
    found = rf"must be one of .*legs.* got '{measure}', which has no reconstr"
    with pytest.raises(ValueError, match=found):
        hippo_memory.reconstruct(measure, np.ones(4), [0.0])


def test_a_generalised_laguerre_basis_is_finite_at_the_present():
    for alpha in (-0.5, 0.5):
        kernels = hippo_memory.basis("glagt", 6, [0.0], alpha=alpha)
        assert_close(kernels[:, 0], hippo.transition("glagt", 6, alpha=alpha)[1])
