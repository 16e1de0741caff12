"""vandermonde and its transpose against the naive sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check, product, temporary_bytes

from kernels import vandermonde, vandermonde_transpose
from kernels.tolerance import assert_close

LENGTHS = [7, 1, 2, 64, 1000]


def nodes(rng, shape, kind):
    log_z = -rng.uniform(0.001, 0.5, shape)
    if kind == "complex":
        return log_z + 1j * rng.uniform(-3.2, 3.2, shape)
    return log_z


def normal(rng, shape, kind="real"):
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if kind == "complex" else x


@product(
    kind=["complex", "real"],
    dtype=["float32", "float64"],
    length=LENGTHS,
    backend=["xla", "reference"],
)
def test_filter_equals_naive_sum(kind, dtype, length, backend):
    rng = np.random.default_rng(length)
    inputs = {"c": normal(rng, (3, 5), kind), "log_z": nodes(rng, (3, 5), kind)}
    check(vandermonde, inputs, dtype, backend, length=length)


@product(
    kind=["complex", "real"],
    dtype=["float32", "float64"],
    length=LENGTHS,
    backend=["xla", "reference"],
)
def test_moments_equal_naive_sum(kind, dtype, length, backend):
    rng = np.random.default_rng(length)
    inputs = {"u": normal(rng, (2, 3, length)), "log_z": nodes(rng, (3, 5), kind)}
    check(vandermonde_transpose, inputs, dtype, backend)


@pytest.mark.parametrize("op", [vandermonde, vandermonde_transpose])
def test_bfloat16(op):
    rng = np.random.default_rng(0)
    log_z = nodes(rng, (3, 5), "real")
    if op is vandermonde:
        inputs, more = {"c": normal(rng, (3, 5))}, {"length": 64}
    else:
        inputs, more = {"u": normal(rng, (2, 3, 64))}, {}
    check(op, {**inputs, "log_z": log_z}, "bfloat16", "xla", **more)


@product(extra=[(2, 4), (), (2,)], leading=[(2, 3), (), (3,)])
def test_leading_axes(extra, leading):
    rng = np.random.default_rng(1)
    log_z = nodes(rng, (*leading, 5), "complex")
    c = normal(rng, (*extra, *leading, 5), "complex")
    check(vandermonde, {"c": c, "log_z": log_z}, "float64", "xla", length=9)
    u = normal(rng, (*extra, *leading, 9))
    check(vandermonde_transpose, {"u": u, "log_z": log_z}, "float64", "xla")


@pytest.mark.parametrize("kinds", [("real", "complex"), ("complex", "real")])
def test_real_with_complex(kinds):
    rng = np.random.default_rng(2)
    inputs = {"c": normal(rng, (3, 5), kinds[0]), "log_z": nodes(rng, (3, 5), kinds[1])}
    check(vandermonde, inputs, "float64", "xla", length=20)


@pytest.mark.parametrize("length", [16384, 100_000])
def test_phases_are_accurate_at_any_length(length):
    """No decay, frequencies up to Nyquist: the hardest case for l * Im(log_z)."""
    rng = np.random.default_rng(3)
    log_z = (1j * rng.uniform(-3.14, 3.14, (2, 4))).astype(np.complex64)
    c = normal(rng, (2, 4), "complex").astype(np.complex64)
    l = np.arange(length, dtype=np.float64)
    powers = np.exp(l * log_z.astype(np.complex128)[..., None])
    expected = np.sum(c[..., None] * powers, -2).real
    assert_close(vandermonde(c, log_z, length), expected)
    u = rng.standard_normal((2, length)).astype(np.float32)
    moments = np.sum(u[:, None] * powers, -1)
    assert_close(vandermonde_transpose(u, log_z), moments)


def test_transpose_is_the_transpose():
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        log_z, c = nodes(rng, (3, 5), "complex"), normal(rng, (3, 5), "complex")
        g = rng.standard_normal((3, 30))
        left = np.sum(vandermonde(c, log_z, 30) * g)
        assert_close(left, np.sum(c * vandermonde_transpose(g, log_z)).real)


def test_moments_are_the_final_state_of_a_scan():
    from kernels import linear_scan

    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        log_z, u = nodes(rng, (3, 5), "complex"), rng.standard_normal((2, 12, 3))
        x = np.broadcast_to(u[..., None], (2, 12, 3, 5))
        _, final = linear_scan(np.exp(log_z), x)
        late_first = np.flip(u, 1).swapaxes(1, 2)
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
        ({"backend": "fast"}, "unknown backend"),
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
