"""Rotary angles are as exact far from the first token as at it."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close
from layers import LAYERS, Sequence
from ssm import rotary

FAR = [0, 1, 255, 256, 2**17 + 3, 2**20 - 1, 2**24 + 1, 2**31 - 1]


def turned(positions, size, base=10_000.0):
    """e^(i position frequency), of products that nothing rounds."""
    turn = 2 * Fraction("3.14159265358979323846264338327950288419716939937510")
    theta = [Fraction(f) for f in rotary.frequencies(size, base)]
    angle = [
        float(Fraction(p) * f % turn)
        for p in np.ravel(positions).tolist()
        for f in theta
    ]
    return np.exp(1j * np.reshape(angle, (*np.shape(positions), size // 2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_angles_of_far_positions(dtype):
    with jax.enable_x64(dtype == "float64"):
        for sign in (1, -1):
            found = rotary.angles(sign * jnp.asarray(FAR), 8, dtype=dtype)
            assert found.dtype == dtype
            expected = turned([sign * p for p in FAR], 8)
            wave = np.exp(1j * np.asarray(found, np.float64))
            assert_close(wave, expected, dtype=dtype)


@pytest.mark.parametrize("below", [1, 2, 256, 257, 2**16, 2**16 + 1])
def test_a_bound_saves_tables_and_changes_nothing(below):
    positions = jnp.asarray([0, below // 2, below - 1])
    found = rotary.angles(positions, 6, below=below)
    assert_close(np.exp(1j * found), turned(positions, 6))


def test_real_positions_and_their_sums():
    """Times add up without rounding each other away, and have a gradient."""
    steps = np.random.default_rng(0).uniform(0.2, 3.0, (2, 100)).astype(np.float32)
    steps[:, 0] = 2**20
    time = jax.jit(rotary.summed)(jnp.asarray(steps))
    exact = np.cumsum(steps.astype(np.float64), 1)
    assert_close(np.exp(1j * rotary.angles(time, 6)), turned(exact, 6), dtype="float32")
    real = jnp.asarray([0.25, -1.5, 2.0**20 + 0.5])
    assert_close(np.exp(1j * rotary.angles(real, 6)), turned(real, 6), dtype="float32")

    def last(steps):
        return jnp.sum(rotary.angles(rotary.summed(steps), 6)[:, -1])

    slope = rotary.frequencies(6).sum()
    found = jax.jit(jax.grad(last))(jnp.asarray(steps[:, :9]))
    assert_close(found, np.full((2, 9), slope), "gradient")


@pytest.mark.parametrize(
    ("length", "elapsed"),
    [
        (2**13, False),
        pytest.param(2**13, True, marks=pytest.mark.slow),
        pytest.param(2**17, False, marks=pytest.mark.slow),
        pytest.param(2**17, True, marks=pytest.mark.slow),
    ],
)
def test_retention_is_as_exact_late_in_a_call_as_early(length, elapsed):
    """Float32 against float64, and halves against the whole."""
    layer = LAYERS["retention"](4, 1, expand_k=2.0)
    x = jax.random.normal(jax.random.key(0), (1, length, 4))
    dt = jnp.full((1, length), 1.25) if elapsed else None
    variables = jax.jit(layer.init)({"params": jax.random.key(1)}, x[:, :2])

    def call(layer, variables, x, state, dt):
        return jax.jit(layer.apply)(variables, x, state, Sequence(dt=dt))

    y, final = call(layer, variables, x, None, dt)
    half = length // 2
    same = None if dt is None else dt[:, :half]
    y0, state = call(layer, variables, x[:, :half], None, same)
    y1, state = call(layer, variables, x[:, half:], state, same)
    assert_close((jnp.concatenate([y0, y1], 1), state), (y, final))
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), np.float64), (variables, x, dt)
        )
        variables, x, dt = wide
        double = call(layer.clone(dtype=jnp.float64), variables, x, None, dt)
    assert_close((y, final), jax.device_get(double), dtype="float32")
