"""Initial eigenvalues and parametrisations against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close
from ssm import hippo, spectra, stability


def test_legs_has_the_published_entries():
    A, B = hippo.legs(3)
    s3, s5 = np.sqrt(3), np.sqrt(5)
    assert_close(A, np.array([[-1, 0, 0], [-s3, -2, 0], [-s5, -s3 * s5, -3]]))
    assert_close(B, np.array([1, s3, s5]))


@pytest.mark.parametrize("N", [2, 8, 64])
def test_normal_part_of_legs_is_rebuilt_from_half_its_eigenpairs(N):
    A, _ = hippo.legs(N)
    P = hippo.legs_low_rank(N)
    normal = A + np.outer(P, P)
    assert_close(normal + normal.T, -np.eye(N))  # skew minus I/2
    lam, V = hippo.hippo_n(N)
    assert lam.shape == (N // 2,) and np.all(lam.imag < 0)
    assert_close(lam.real, np.full(N // 2, -0.5))
    assert_close(2 * (V * lam @ V.conj().T).real, normal)
    assert_close(V.conj().T @ V, np.eye(N // 2).astype(complex))


def test_odd_state_size_is_refused():
    with pytest.raises(ValueError, match=r"N: .*even, got 3"):
        hippo.normal_eigenpairs(-0.5 * np.eye(3))


def test_s4d_spectra_have_the_published_values():
    n, N = 4, 8
    j = np.arange(n)
    expected = {
        "lin": -0.5 - 1j * np.pi * j,
        "inv": -0.5 - 1j * N / np.pi * (N / (2 * j + 1) - 1),
        "inv2": -0.5 - 1j * N / np.pi * (N / (j + 1) - 1),
        "quad": -0.5 - 1j / np.pi * (1 + 2 * j) ** 2,
        "real": -(j + 1.0) + 0j,
    }
    for name, lam in expected.items():
        assert_close(spectra.s4d(name, n), lam)
    with pytest.raises(ValueError, match=r"spectrum: must be .*legs.* got 'fout'"):
        spectra.s4d("fout", n)


def test_inv_is_the_asymptotic_of_legs():
    """The largest frequencies at N = 64, to the published digits."""
    legs = np.sort(-spectra.s4d("legs", 32).imag)[::-1][:4]
    inv = np.sort(-spectra.s4d("inv", 32).imag)[::-1][:4]
    np.testing.assert_allclose(legs, [1303, 433, 258, 183], atol=0.6)
    np.testing.assert_allclose(inv, [1283, 414, 240, 166], atol=0.6)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_s5_blocks_are_block_diagonal_hippo(blocks):
    lam, V, V_inv = spectra.s5_blocks(16, blocks)
    one, _ = hippo.hippo_n(16 // blocks)
    assert_close(lam, np.tile(one, blocks))
    assert_close(V_inv @ V, np.eye(8).astype(complex))
    A = 2 * (V * lam @ V_inv).real
    mask = np.kron(np.eye(blocks), np.ones((16 // blocks,) * 2))
    assert_close(A * mask, A)


@pytest.mark.parametrize("blocks", [0, 3, 16])
def test_s5_blocks_must_divide_the_state(blocks):
    with pytest.raises(ValueError, match=rf"blocks: .*state_size=16.*got {blocks}"):
        spectra.s5_blocks(16, blocks)


def test_lru_ring_is_uniform_on_the_ring():
    r_min, r_max, phase = 0.5, 0.9, 1.0
    keys = jax.random.split(jax.random.key(0))
    nu = spectra.lru_nu(keys[0], 20_000, r_min, r_max)
    theta = spectra.lru_theta(keys[1], 20_000, phase)
    lam = np.exp(np.asarray(stability.ring(nu, theta)))
    square = (np.abs(lam) ** 2 - r_min**2) / (r_max**2 - r_min**2)
    for values in (square, np.angle(lam) / phase):
        # The largest gap of 20000 uniform draws to their distribution (KS, p ~ 1e-9).
        gap = np.abs(np.sort(values) - np.linspace(0, 1, len(values))).max()
        assert gap < 3.3 / np.sqrt(len(values))
    gamma = np.exp(np.asarray(spectra.lru_gamma(nu)))
    assert_close(gamma**2, 1 - np.abs(lam) ** 2, dtype="float32")
    with pytest.raises(ValueError, match="r_min"):
        spectra.lru_nu(jax.random.key(0), 4, 0.9, 0.5)
    with pytest.raises(ValueError, match="max_phase"):
        spectra.lru_theta(jax.random.key(0), 4, 7.0)


def test_log_dt_stays_in_its_range():
    dt = np.exp(spectra.log_dt(jax.random.key(1), (1000,), 1e-3, 1e-1))
    assert 1e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1
    with pytest.raises(ValueError, match="dt_min"):
        spectra.log_dt(jax.random.key(1), (1,), 0.1, 0.01)


@pytest.mark.parametrize("name", stability.POSITIVE)
def test_positive_transforms_invert(name):
    rate = np.array([1e-3, 0.5, 0.9])
    again = stability.positive(name).forward(jnp.asarray(stability.inverse(name, rate)))
    assert_close(np.asarray(again), rate.astype(np.float32))
    with pytest.raises(ValueError, match=r"transform: must .*softplus.* got 'square'"):
        stability.positive("square")


def test_sigmoid_refuses_rates_it_cannot_reach():
    with pytest.raises(
        ValueError, match=r"must reach the rate 3, got .sigmoid., which stays"
    ):
        stability.inverse("sigmoid", np.array([3.0]))


def test_pairs_round_trip_and_clip():
    z = jnp.asarray([1 + 2j, -3 - 4j], jnp.complex64)
    assert_close(stability.from_pair(stability.to_pair(z)), z)
    assert stability.clip_real(z).real.max() <= -1e-4
