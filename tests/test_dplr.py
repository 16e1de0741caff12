"""Diagonal plus low rank systems against dense NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close, error
from ssm import discretize, dplr, filters, hippo

N, B = 8, 3
DT = np.array([1e-3, 0.1])  # one slow and one fast head
SHIFT = 1e-3  # of all eigenvalues: Fourier measures have one at 0, no layer does


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def systems(measure, rank):
    """The DPLR system of two heads, and the dense (A_bar, B_bar) of each, in the
    coordinates of the measure, with the map V from half states to them."""
    lam, P, B_half, V = hippo.nplr(measure, N, rank)
    A, B_full = hippo.transition(measure, N)
    A = A - SHIFT * np.eye(N)
    heads = len(DT)
    system = dplr.DPLR(
        jnp.asarray(np.tile(lam - SHIFT, (heads, 1))),
        jnp.asarray(np.repeat(P[:, None], heads, 1)),
        jnp.asarray(np.tile(B_half, (heads, 1))),
        jnp.asarray(DT)[:, None],
    )
    return system, [discretize.dense_gbt(A, B_full, dt) for dt in DT], V


def weights(V, seed=0):
    """C [1, heads, n] and the same row in the coordinates of the measure."""
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((len(DT), N))
    return jnp.asarray(full @ V)[None], full


def taps(dense, full, length):
    """C A_bar^l B_bar by stepping."""
    rows = []
    for (A_bar, B_bar), c in zip(dense, full, strict=True):
        x, row = B_bar, []
        for _ in range(length):
            row.append(c @ x)
            x = A_bar @ x
        rows.append(row)
    return np.array(rows)


RANKS = [("legs", 1), ("legs", 3), ("legt", 2), ("fout", 1), ("foud", 1)]
LENGTHS = [(*case, length) for case in RANKS for length in (33, 64)]


@pytest.mark.parametrize(
    ("measure", "rank", "length"), [*LENGTHS, ("legs", 1, 1), ("legs", 1, 2)]
)
def test_filter_equals_dense_powers(measure, rank, length):
    system, dense, V = systems(measure, rank)
    C, full = weights(V)

    @jax.jit
    def run(system, C):
        C_tilde = dplr.truncated(system, C, length)
        return filters.dplr(system, C_tilde, length)[0]

    np.testing.assert_allclose(run(system, C), taps(dense, full, length), atol=1e-9)


@pytest.mark.parametrize("length", [1, 6, 64])
@pytest.mark.parametrize(("measure", "rank"), [("legt", 2), ("fout", 1)])
def test_c_comes_back_from_the_truncated_one(measure, rank, length):
    system, _, V = systems(measure, rank)
    C, _ = weights(V)
    there = jax.jit(functools.partial(dplr.truncated, length=length))
    back = jax.jit(functools.partial(dplr.untruncated, length=length))
    # the slowest mode decays by dt SHIFT = 1e-6 a step
    np.testing.assert_allclose(back(system, there(system, C)), C, atol=1e-6)


@pytest.mark.parametrize(("measure", "rank"), RANKS)
def test_dense_matrices_and_steps(measure, rank):
    system, dense, V = systems(measure, rank)
    A_bar, B_bar = dplr.dense(system)
    into = np.concatenate([2 * V.real, -2 * V.imag], 1)  # real coordinates -> measure
    for h, (A_dense, B_dense) in enumerate(dense):
        np.testing.assert_allclose(into @ A_bar[h], A_dense @ into, atol=1e-10)
        np.testing.assert_allclose(into @ B_bar[h], B_dense, atol=1e-10)


@pytest.mark.parametrize(
    ("measure", "rank"), [("legs", 1), pytest.param("legt", 2, marks=pytest.mark.slow)]
)
def test_states_in_and_out(measure, rank):
    """What a state says, the state that is left, and stepping, for odd lengths."""
    system, _, V = systems(measure, rank)
    C, _ = weights(V)
    rng = np.random.default_rng(1)
    length, heads = 13, len(DT)
    u = jnp.asarray(rng.standard_normal((B, length, heads)))
    parts = rng.standard_normal((2, B, heads, N // 2))
    state = jnp.asarray(parts[0] + 1j * parts[1])
    expected, last = dplr.varying(system, C[0], u, state, chunk=5)
    K = filters.dplr(system, dplr.truncated(system, C, length), length)[0]
    convolved = sum(
        np.pad(K[:, j] * u[:, : length - j], ((0, 0), (j, 0), (0, 0)))
        for j in range(length)
    )
    heard = dplr.response(system, C[0], state, length)
    np.testing.assert_allclose(convolved + heard, expected, atol=1e-9)
    np.testing.assert_allclose(dplr.final_state(system, u, state), last, atol=1e-9)


def test_padding_in_front_does_not_move_the_state():
    system, _, _ = systems("legs", 1)
    rng = np.random.default_rng(2)
    u = jnp.asarray(rng.standard_normal((B, 9, len(DT))))
    state = jnp.ones((B, len(DT), N // 2)) + 0j
    counts = jnp.array([9, 4, 0])
    real = jnp.arange(9) >= 9 - counts[:, None]
    found = dplr.final_state(system, jnp.where(real[..., None], u, 0), state, counts)
    for b, count in enumerate(counts):
        expected = state[b : b + 1]
        if count:
            expected = dplr.final_state(system, u[b : b + 1, 9 - count :], expected)
        np.testing.assert_allclose(found[b : b + 1], expected, atol=1e-10)


def test_no_time_no_change():
    system, _, _ = systems("legt", 2)
    still = system._replace(dt=0 * system.dt)
    state = jnp.ones((B, len(DT), N // 2)) * (1 + 2j)
    found = dplr.step(still, dplr.prepare(still), jnp.ones((B, len(DT))), state)
    np.testing.assert_array_equal(found, state)


@pytest.mark.slow
def test_without_low_rank_it_is_the_bilinear_diagonal_system():
    system, _, V = systems("legs", 1)
    plain = system._replace(P=system.P[:0])
    C, _ = weights(V)
    log_a, gain = discretize.bilinear(system.lam, system.dt)
    expected = filters.diagonal(log_a, gain * system.B, 2 * C[0], 30)
    found = filters.dplr(plain, dplr.truncated(plain, C, 30), 30)[0]
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_filter_of_legs_is_the_legendre_basis():
    """As dt -> 0: K_l -> dt sum_n C_n r_n P_n(2 e^-t - 1) e^-t, with t in the middle
    of the step for the bilinear rule."""
    system, _, V = systems("legs", 1)
    slow = system._replace(dt=jnp.full((2, 1), 1e-4))
    C, full = weights(V)
    K = filters.dplr(slow, dplr.truncated(slow, C, 400), 400)[0]
    t = (np.arange(400) + 0.5) * 1e-4
    y, decay = 2 * np.exp(-t) - 1, np.exp(-(1 + SHIFT) * t)
    basis = [
        np.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(y) * decay
        for n in range(N)
    ]
    np.testing.assert_allclose(K, 1e-4 * full @ np.array(basis), rtol=0, atol=1e-8)


def test_gradients_are_finite_at_the_last_frequency_and_right():
    """Even length, theta = pi on the grid: by finite differences of log dt."""
    system, _, V = systems("legs", 1)
    C, _ = weights(V)

    @jax.jit
    def loss(log_dt):
        K = filters.dplr(system._replace(dt=jnp.exp(log_dt)), C, 64)
        return jnp.sum(K**2)

    at = jnp.log(system.dt)
    found = jax.grad(loss)(at)
    for h in range(2):
        d = jnp.zeros_like(at).at[h].set(1e-6)
        expected = (loss(at + d) - loss(at - d)) / 2e-6
        np.testing.assert_allclose(found[h, 0], expected, rtol=1e-6)


@pytest.mark.slow
def test_float32_gradients_of_a_long_filter():
    """128 channels of HiPPO-LegS, N = 64, L = 16384: float32 beside float64."""
    size, length = 64, 16384
    lam, P, B_half, _ = hippo.nplr("legs", size, 1)
    rng = np.random.default_rng(0)
    heads = 128
    rows = {
        "lam": np.tile(lam, (heads, 1)),
        "P": np.repeat(P[:, None], heads, 1),
        "B": np.tile(B_half, (heads, 1)),
        "log_dt": rng.uniform(np.log(1e-3), np.log(1e-1), (heads, 1)),
        "C": rng.standard_normal((2, 1, heads, size // 2)),
    }
    rows["C"] = rows["C"][0] + 1j * rows["C"][1]
    # the same numbers for both, as float32 holds them
    rows = {
        k: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32)
        for k, x in rows.items()
    }
    weight = rng.standard_normal((heads, length)).astype(np.float32)

    def gradients(dtype):
        complex_dtype = np.result_type(dtype, np.complex64)
        given = {
            k: jnp.asarray(x, complex_dtype if np.iscomplexobj(x) else dtype)
            for k, x in rows.items()
        }

        def loss(p):
            system = dplr.DPLR(p["lam"], p["P"], p["B"], jnp.exp(p["log_dt"]))
            return jnp.sum(weight * filters.dplr(system, p["C"], length)[0])

        return jax.jit(jax.grad(loss))(given)

    found, expected = gradients(np.float32), gradients(np.float64)
    errors = {k: error(found[k], expected[k]) for k in rows}
    assert found["log_dt"].dtype == jnp.float32
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_filter_of_several_lengths(times):
    """Behind the length of its C~ a filter goes on as that of C, and where slow modes
    outlive that length float32 loses no more than its own rounding."""
    system, _, V = systems("legt", 2)
    C, _ = weights(V)
    longer = jax.jit(functools.partial(dplr.lengthened, length=11, times=times))
    expected = dplr.truncated(system, C, 11 * times)
    np.testing.assert_allclose(
        longer(system, dplr.truncated(system, C, 11)), expected, atol=1e-9
    )
    narrow = jax.tree.map(
        lambda x: x.astype(np.complex64 if jnp.iscomplexobj(x) else np.float32),
        (system, dplr.truncated(system, C, 11)),
    )
    found = jax.device_get(longer(*narrow))
    assert_close(found, expected, dtype="float32")
