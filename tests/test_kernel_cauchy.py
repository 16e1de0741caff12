"""cauchy against the naive sums, its gradients, memory and behaviour at theta = pi."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check, inputs_of, product, temporary_bytes

from kernels import cauchy
from kernels.tolerance import error

LENGTHS = [7, 1, 2, 64, 1000]


def case(length=7, **sizes):
    return inputs_of("cauchy", "shared nodes", length, **sizes)


@product(dtype=["float32", "float64"], length=LENGTHS, backend=["xla", "reference"])
def test_equals_the_naive_sum(dtype, length, backend):
    check(cauchy, case(length), dtype, backend, length=length)


@pytest.mark.parametrize("extra", [(), (2, 2)])
@pytest.mark.parametrize("heads", [(), (2, 3)])
def test_leading_axes(extra, heads):
    inputs = case(H=math.prod(heads))
    sums = inputs["v"][: math.prod(extra)]
    inputs["v"] = sums.reshape(*extra, *heads, 5)
    inputs["z"] = inputs["z"].reshape(*heads, 5)
    check(cauchy, inputs, "float64", "xla", length=9)


def test_more_frequencies_than_a_block():
    check(cauchy, case(H=2, N=4), "float64", "xla", length=3001)


def test_is_the_textbook_sum_away_from_the_singularity():
    """s k[m] = sum v / (g - z) with g = 2 (1 - w) / (1 + w), w = e^{-i theta}."""
    inputs, length = case(), 33
    with jax.enable_x64(True):
        actual = np.asarray(cauchy(**inputs, length=length))
    root = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    g = 2 * (1 - root) / (1 + root)
    v, z = inputs["v"][..., None], inputs["z"][..., None]
    expected = (v / (g - z) + v.conj() / (g - z.conj())).sum(-2)
    s = 2 * np.cos(np.pi * np.arange(length // 2 + 1) / length)
    np.testing.assert_allclose(s * actual, expected, rtol=1e-12)


def test_the_last_frequency_of_an_even_grid_is_exact():
    """theta = pi: w = 4i and s = 0, so k = 2 Re(sum v) / 4i."""
    inputs = case()
    actual = cauchy(
        **{k: jnp.asarray(x, jnp.complex64) for k, x in inputs.items()}, length=64
    )
    expected = 2 * inputs["v"].real.sum(-1) / 4j
    assert error(actual[..., -1], expected) < 1e-6


def test_the_gradient_makes_no_table():
    """The naive sum keeps [H, n, L]; this one blocks of frequencies."""
    inputs = {k: jnp.asarray(x, jnp.complex64) for k, x in case(H=16, N=32).items()}

    def gradient(v, z):
        def loss(v, z):
            return jnp.sum(jnp.abs(cauchy(v, z, 16384)) ** 2)

        return jax.grad(loss, (0, 1))(v, z)

    table = 16 * 32 * 8193 * 8
    assert temporary_bytes(gradient, inputs["v"], inputs["z"]) < table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=0), "length must be an integer >= 1, got 0"),
        (dict(v=jnp.ones((3, 5))), "v must be complex, got float32"),
        (dict(z=jnp.ones((3, 5))), "z must be complex, got float32"),
        (dict(v=jnp.ones((3, 4), complex)), "v must have the N of z = 5, got 4"),
        (dict(v=jnp.ones((2, 5), complex)), r"v must be \[\*E, \*H, n\]"),
        (dict(backend="cuda"), "backend must be one of .*, got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    arguments = {k: jnp.asarray(x, jnp.complex64) for k, x in case().items()}
    with pytest.raises(ValueError, match=message):
        cauchy(**{**arguments, "length": 8, **change})
