"""vandermonde and its transpose against the naive sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check, inputs_of, product, temporary_bytes

from kernels import linear_scan, vandermonde, vandermonde_transpose
from kernels.tolerance import assert_close

LENGTHS = [7, 1, 2, 64, 1000]


@product(
    kind=["complex", "real"],
    dtype=["float32", "float64"],
    length=LENGTHS,
    backend=["xla", "reference"],
)
def test_filter_equals_naive_sum(kind, dtype, length, backend):
    inputs = inputs_of("vandermonde", kind, length)
    check(vandermonde, inputs, dtype, backend, length=length)


@product(
    kind=["complex", "real"],
    dtype=["float32", "float64"],
    length=LENGTHS,
    backend=["xla", "reference"],
)
def test_moments_equal_naive_sum(kind, dtype, length, backend):
    inputs = inputs_of("vandermonde_transpose", kind, length)
    check(vandermonde_transpose, inputs, dtype, backend)


@pytest.mark.parametrize("op", [vandermonde, vandermonde_transpose])
def test_bfloat16(op):
    options = {"length": 64} if op is vandermonde else {}
    check(op, inputs_of(op.__name__, "real", 64), "bfloat16", "xla", **options)


@product(extra=[(2, 4), (), (2,)], leading=[(2, 3), (), (3,)])
def test_leading_axes(extra, leading):
    channels, rows = math.prod(leading), math.prod(extra)
    arrays = inputs_of("vandermonde_transpose", "complex", 9, B=rows, H=channels)
    log_z = arrays["log_z"].reshape(*leading, 5)
    u = arrays["u"].reshape(*extra, *leading, 9)
    check(vandermonde_transpose, {"u": u, "log_z": log_z}, "float64", "xla")
    c = u[..., :5] + 1j * u[..., 4:]
    check(vandermonde, {"c": c, "log_z": log_z}, "float64", "xla", length=9)


def test_real_with_complex():
    inputs = inputs_of("vandermonde", "real c", 20)
    check(vandermonde, inputs, "float64", "xla", length=20)
    inputs = inputs_of("vandermonde", "complex", 20)
    inputs["log_z"] = inputs["log_z"].real
    check(vandermonde, inputs, "float64", "xla", length=20)


@pytest.mark.parametrize("length", [16384, 100_000])
def test_phases_are_accurate_at_any_length(length):
    """No decay, frequencies up to Nyquist: the hardest case for l * Im(log_z)."""
    rng = np.random.default_rng(3)
    log_z = (1j * rng.uniform(-3.14, 3.14, (2, 4))).astype(np.complex64)
    c = (rng.standard_normal((2, 4)) + 1j * rng.standard_normal((2, 4))).astype(
        np.complex64
    )
    l = np.arange(length, dtype=np.float64)
    powers = np.exp(l * log_z.astype(np.complex128)[..., None])
    expected = np.sum(c[..., None] * powers, -2).real
    assert_close(vandermonde(c, log_z, length), expected)
    u = rng.standard_normal((2, length)).astype(np.float32)
    moments = np.sum(u[:, None] * powers, -1)
    assert_close(vandermonde_transpose(u, log_z), moments)


def test_transpose_is_the_transpose():
    with jax.enable_x64(True):
        c, log_z = inputs_of("vandermonde", "complex", 30).values()
        g = inputs_of("vandermonde_transpose", "complex", 30)["u"]
        left = np.sum(vandermonde(c, log_z, 30) * g)
        assert_close(left, np.sum(c * vandermonde_transpose(g, log_z)).real)


def test_moments_are_the_final_state_of_a_scan():
    with jax.enable_x64(True):
        late_first, log_z = inputs_of("vandermonde_transpose", "complex", 12).values()
        u = np.flip(late_first.swapaxes(1, 2), 1)
        x = np.broadcast_to(u[..., None], (2, 12, 3, 5))
        _, final = linear_scan(np.exp(log_z), x)
        assert_close(vandermonde_transpose(late_first, log_z), final)


def test_memory_is_far_below_modes_times_length():
    heads, modes, length = 8, 64, 16384
    c = jax.ShapeDtypeStruct((heads, modes), jnp.complex64)
    u = jax.ShapeDtypeStruct((heads, length), jnp.float32)

    def filter_gradient(c, log_z, g):
        return jax.vjp(lambda c, z: vandermonde(c, z, length), c, log_z)[1](g)

    def moment_gradient(u, log_z):
        def loss(u, log_z):
            return jnp.sum(jnp.abs(vandermonde_transpose(u, log_z)) ** 2)

        return jax.grad(loss, (0, 1))(u, log_z)

    full = heads * modes * length * 8
    assert temporary_bytes(filter_gradient, c, c, u) < full / 10
    assert temporary_bytes(moment_gradient, u, c) < full / 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 0}, "length must be an integer >= 1, got 0"),
        ({"length": 2.0}, "length must be an integer"),
        ({"c": np.ones((3, 4), np.float32)}, "c must have the N of log_z = 5, got 4"),
        ({"c": np.ones((2, 5), np.float32)}, "c must be .*as in log_z"),
        ({"c": np.ones((3, 5), np.int32)}, "c must be floating point"),
        ({"log_z": np.ones((3, 0), np.float32)}, "log_z must be"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
    ],
)
def test_bad_input(change, words):
    good = {"c": np.ones((3, 5), np.float32), "log_z": -np.ones((3, 5), np.float32)}
    with pytest.raises(ValueError, match=f"vandermonde: {words}"):
        vandermonde(**{**good, "length": 4, **change})


@pytest.mark.parametrize(
    ("u", "words"),
    [
        (np.ones((3, 0), np.float32), "u must be without an empty axis"),
        (np.ones((2, 4), np.float32), "u must be .*as in log_z"),
        (np.ones((3, 4), np.complex64), "u must be real"),
    ],
)
def test_transpose_bad_input(u, words):
    with pytest.raises(ValueError, match=f"vandermonde_transpose: {words}"):
        vandermonde_transpose(u, -np.ones((3, 5), np.float32))
