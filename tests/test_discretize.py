"""Diagonal rules against dense float64 discretisation and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from kernels.tolerance import assert_close
from ssm import discretize

LAM = np.array([-0.5 + 3.0j, -1e-5 + 0j, -2.0 - 40.0j, -0.5 + 0j, -1e-3 + 1e-3j])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def diagonal(rule, dt, **kwargs):
    log_a, gain = rule(jnp.asarray(LAM), dt, **kwargs)
    return np.exp(np.asarray(log_a)), np.asarray(gain)


def test_zoh_equals_the_dense_matrix_exponential(x64):
    A, B = np.diag(LAM), np.ones(len(LAM))
    a, gain = diagonal(discretize.zoh, 0.1)
    A_bar, B_bar = discretize.dense_zoh(A, B, 0.1)
    assert_close(a, np.diag(A_bar))
    assert_close(gain, B_bar)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gbt_equals_the_dense_solve(x64, alpha):
    A, B = np.diag(LAM), np.ones(len(LAM))
    a, gain = diagonal(discretize.gbt, 0.07, alpha=alpha)
    A_bar, B_bar = discretize.dense_gbt(A, B, 0.07, alpha)
    assert_close(a, np.diag(A_bar))
    assert_close(gain, B_bar)


def test_dense_zoh_accepts_a_singular_matrix_and_several_inputs():
    A = np.array([[0.0, 1.0], [0.0, 0.0]])
    A_bar, B_bar = discretize.dense_zoh(A, np.eye(2), 0.5)
    assert_close(A_bar, scipy.linalg.expm(A * 0.5))
    assert_close(B_bar, np.array([[0.5, 0.125], [0.0, 0.5]]))


def test_bilinear_and_zoh_agree_to_third_order(x64):
    """Per step the two differ by O(dt^3): halving dt divides the gap by eight."""
    lam = jnp.asarray([-0.5 + 3.0j])

    def gap(dt):
        zoh, _ = discretize.zoh(lam, dt)
        bilinear, _ = discretize.bilinear(lam, dt)
        return float(jnp.abs(jnp.exp(zoh) - jnp.exp(bilinear))[0])

    assert 7.5 < gap(0.02) / gap(0.01) < 8.5


def test_dirac_and_async_scale_the_input_by_the_learned_step_alone(x64):
    gap = 2.5
    a, gain = diagonal(discretize.dirac, 0.1, elapsed=gap)
    assert_close(a, np.exp(LAM * 0.1 * gap))
    assert_close(gain, np.ones_like(LAM))
    a, gain = diagonal(discretize.async_, 0.1, elapsed=gap)
    assert_close(a, np.exp(LAM * 0.1 * gap))
    assert_close(gain, diagonal(discretize.zoh, 0.1)[1])


@pytest.mark.parametrize("name", discretize.DISCRETIZATIONS)
def test_no_elapsed_time_is_no_decay(name, x64):
    log_a, _ = discretize.get(name)(jnp.asarray(LAM), 0.1, 0.0)
    assert_close(np.asarray(log_a), np.zeros_like(LAM))


def test_gain_is_accurate_in_float32_where_the_textbook_form_cancels():
    lam = np.array([1e-6, 1e-4, 9e-3, 1.1e-2, 0.3]) * (-1 + 1j)
    _, gain = jax.jit(discretize.zoh)(jnp.asarray(lam, jnp.complex64), 0.1)
    z = lam * 0.1
    exact = 0.1 * (1 + z / 2 + z**2 / 6 + z**3 / 24 + z**4 / 120 + z**5 / 720)
    assert_close(np.asarray(gain)[:4], exact[:4].astype(np.complex64))


def test_gain_has_a_finite_gradient_at_zero():
    gradient = jax.grad(lambda lam: discretize.zoh(lam, 0.1)[1])(0.0)
    assert_close(gradient, np.float32(0.1**2 / 2))


@pytest.mark.parametrize("name", discretize.DISCRETIZATIONS)
def test_no_elapsed_times_are_regular_steps(name):
    rule = discretize.get(name)
    lam = LAM.astype(np.complex64)
    np.testing.assert_array_equal(rule(lam, 0.1, None), rule(lam, 0.1, 1.0))


def test_unknown_rule_lists_the_names():
    with pytest.raises(ValueError, match=r"must be one of .*bilinear.*zoh.*'euler'"):
        discretize.get("euler")


class TestRules(chex.TestCase):
    """Every rule gives the same compiled or not, for arrays of JAX and of NumPy."""

    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    def test_steps_of_every_shape(self):
        lam, dt = LAM.astype(np.complex64), np.float32([[0.1], [0.0]])
        for rule in discretize.DISCRETIZATIONS.values():
            log_a, gain = self.variant(rule)(lam, dt)
            chex.assert_shape(log_a, (2, len(LAM)))
            chex.assert_is_broadcastable(jnp.shape(gain), log_a.shape)
            chex.assert_tree_all_finite((log_a, gain))
            with jax.enable_x64(True):
                exact = rule(lam.astype(np.complex128), dt.astype(np.float64))
            assert_close((np.exp(log_a), gain), (np.exp(exact[0]), exact[1]))
