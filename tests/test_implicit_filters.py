"""What programs make of lags: as accurate as tables of all of them, but no table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close
from ssm import implicit_filters

LENGTHS = [1, 2, 128, 129, 1000, 2**17]
DTYPES = ["float32", "float64"]


def window(length, features, fast, slow, target):
    delta = np.log(target) * np.linspace(1 / slow, 1 / fast, features)
    return np.exp(-np.abs(delta)[:, None] * np.linspace(0, 1, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_positions(length, dtype):
    """t, then the real and the imaginary parts of the waves."""
    with jax.enable_x64(dtype == "float64"):
        found = implicit_filters.positions(length, 5, dtype)
        assert found.shape == (length, 11) and found.dtype == dtype
    t, waves = found[:, :1], found[:, 1:]
    angle = np.outer(np.arange(length), np.linspace(1e-4, 4, 5)) * (2 * np.pi / length)
    assert_close(t[:, 0], np.linspace(0, 1, length))
    assert_close(waves, np.concatenate([np.cos(angle), -np.sin(angle)], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_window_is_exact_where_it_is_small(length, dtype):
    """Each entry against itself, down to 1e-10."""
    with jax.enable_x64(dtype == "float64"):
        found = implicit_filters.exponential_window(
            length, 4, 0.2, 1.5, 0.01, 0.0, dtype
        )
        assert found.dtype == dtype
    exact = np.asarray(found) / window(length, 4, 0.2, 1.5, 0.01)
    assert_close(exact, np.ones((4, length)), dtype=dtype)
    shifted = implicit_filters.exponential_window(length, 4, 0.2, 1.5, 0.01, 0.5)
    assert_close(shifted, window(length, 4, 0.2, 1.5, 0.01) + 0.5)


def test_window_without_a_dtype_is_the_widest():
    arguments = (10, 4, 0.2, 1.5, 0.01, 0.0)
    with jax.enable_x64(True):
        assert implicit_filters.exponential_window(*arguments).dtype == "float64"
        assert implicit_filters.positions(10, 2).dtype == "float64"
    assert implicit_filters.exponential_window(*arguments).dtype == "float32"
    assert implicit_filters.positions(10, 2).dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_power_decay(dtype):
    """Narrow taps too: lags are counted in float32."""
    k, exponent = jnp.ones((2, 1000), dtype), jnp.array([0.5, 1.5], dtype)
    found = implicit_filters.power_decay(k, exponent)
    lags = np.arange(1, 1001.0)
    assert_close(
        found.astype(jnp.float32), np.stack([lags**-0.5, lags**-1.5]), dtype=dtype
    )


def test_free_filters_that_fade():
    """Feature 3 of 4 has faded to exp(-2^(3/4)) at the end of its taps."""
    key = jax.random.key(0)
    plain = implicit_filters.free(key, (4, 1000)) / implicit_filters.SCALES["random"]
    found = implicit_filters.free(key, (4, 1000), start="double_exp")
    fading = found / plain / implicit_filters.SCALES["double_exp"]
    rate = 2 ** (np.arange(4) / 4)
    assert_close(fading, np.exp(-rate[:, None] * np.arange(1000) / 1000))
