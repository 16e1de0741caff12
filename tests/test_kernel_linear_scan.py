"""linear_scan and contracted_scan against their definitions."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    DTYPES,
    LENGTHS,
    OPTIONS,
    check,
    inputs_of,
    product,
    results,
    temporary_bytes,
)

from kernels import contracted_scan, linear_scan, pairs
from kernels.linear_scan import BACKENDS, gradient, xla
from kernels.tolerance import assert_close


def scan_inputs(length, options, variant="real", **sizes):
    return inputs_of("linear_scan", variant, length, options, **sizes)


@product(dtype=DTYPES, length=LENGTHS, options=OPTIONS)
def test_real_scan_equals_definition(dtype, length, options):
    inputs = scan_inputs(length, options)
    check(
        linear_scan,
        inputs,
        dtype,
        "xla",
        reverse="reverse" in options,
        return_transition=True,
    )


@product(
    variant=["complex", "complex x", "complex a"],
    length=LENGTHS,
    options=OPTIONS,
)
def test_complex_scan_equals_definition(variant, length, options):
    check(
        linear_scan,
        scan_inputs(length, options, variant),
        "float32",
        "xla",
        reverse="reverse" in options,
        return_transition=True,
    )


@product(
    kind=["complex", "real"],
    shape=[
        (3, 4),
        (2, 1, 3, 4),
        (1, 9, 3, 1),
        (2, 9, 1, 1),
        (1, 1, 1, 4),
        (1, 9, 1, 4),
    ],
    reverse=[False, True],
)
def test_decay_that_broadcasts(kind, shape, reverse):
    inputs = scan_inputs(9, {"state", "reset"}, kind, D=12)
    for name, x in inputs.items():
        if name != "reset":
            inputs[name] = x.reshape(*x.shape[:-1], 3, 4)
    # the first along every axis of which there is one
    decay = inputs["a"] if len(shape) == 4 else inputs["a"][0, 0]
    inputs["a"] = decay[tuple(slice(size) for size in shape)]
    check(
        linear_scan, inputs, "float64", "xla", reverse=reverse, return_transition=True
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_in_low_precision(dtype):
    inputs = scan_inputs(64, {"state", "reset"})
    check(linear_scan, inputs, dtype, "reference", return_transition=True)


def test_scalar_features_and_zero_decay():
    inputs = {name: x[..., 0] for name, x in scan_inputs(11, {"state"}).items()}
    inputs["a"] = inputs["a"] * (np.arange(11) != 4)
    check(linear_scan, inputs, "float64", "xla", return_transition=True)
    inputs["a"] = np.zeros(())
    check(linear_scan, inputs, "float64", "xla", return_transition=True)


def split_equals_whole(op, inputs, sequences, cut, reverse):
    """Two calls in the order of processing equal one, and transitions multiply."""
    first = {k: v[:, :cut] if k in sequences else v for k, v in inputs.items()}
    second = {k: v[:, cut:] if k in sequences else v for k, v in inputs.items()}
    if reverse:
        first, second = second, first
    run = jax.jit(
        lambda inputs: op(**inputs, reverse=reverse, return_transition=True),
    )
    y, final, transition = run(inputs)
    y1, middle, transition1 = run(first)
    y2, last, transition2 = run({**second, "initial_state": middle})
    joined = jnp.concatenate([y2, y1] if reverse else [y1, y2], 1)
    assert_close((joined, last), (y, final))
    assert_close(transition1 * transition2, transition)
    return run


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_two_calls_compose(kind, reverse, reset):
    with jax.enable_x64(True):
        inputs = scan_inputs(20, {"state"} | ({"reset"} if reset else set()), kind)
        if reset:
            inputs["reset"][0] = False
            inputs["reset"][1] = np.arange(20) == 7  # on the cut itself
        run = split_equals_whole(linear_scan, inputs, {"a", "x", "reset"}, 7, reverse)
        h, final, transition = run(inputs)
        without = dict(inputs, initial_state=np.zeros_like(inputs["initial_state"]))
        assert_close(final - run(without)[1], transition * inputs["initial_state"])
        if not reset:
            assert_close(final, h[:, 0] if reverse else h[:, -1])


def test_dtypes_of_results():
    a, x = jnp.ones((1, 4, 2)), jnp.ones((1, 4, 2), jnp.bfloat16)
    h, final = linear_scan(a, x)
    assert (h.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    h, final = linear_scan(a.astype(jnp.complex64), x)
    assert (h.dtype, final.dtype) == (jnp.complex64, jnp.complex64)


def test_a_backend_on_real_pairs():
    """The form that Triton and Pallas backends take: (re, im) in, (re, im) out."""

    def forward(a, x, state, keep, reverse):
        arrays = (pairs.join(pair) for pair in (a, x, state))
        h, final = xla.forward(*arrays, keep, reverse)
        return pairs.split(h), pairs.split(final)

    def backward(a, h, state, keep, like_x, dh, dfinal, reverse):
        """On pairs the gradient is conjugated: g[t] = dh[t] + conj(a[t+1]) g[t+1]."""
        arrays = (pairs.join(pair) for pair in (pairs.conj(a), pairs.conj(h)))
        a, h = arrays
        state = pairs.join(pairs.conj(state))
        cotangents = (pairs.join(pair) for pair in (like_x, dh, dfinal))
        gradients = xla.backward(a, h, state, keep, *cotangents, reverse)
        return tuple(pairs.split(gradient) for gradient in gradients)

    module = SimpleNamespace(PAIRS=True, forward=forward, backward=backward)
    inputs = scan_inputs(9, {"state", "reset"}, "complex")
    keep = 1.0 - inputs.pop("reset")

    def run(backend, a, x, initial_state):
        return gradient.solve(backend, False, a, x, initial_state, keep)

    with jax.enable_x64(True):
        on_pairs = results(partial(run, module), inputs)
        assert_close(on_pairs, results(partial(run, xla), inputs))


def test_same_inputs_same_bits():
    inputs = scan_inputs(100, {"state"})
    run = jax.jit(jax.value_and_grad(lambda a, x: linear_scan(a, x)[0].sum()))
    a, x = np.float32(inputs["a"]), np.float32(inputs["x"])
    assert np.array_equal(run(a, x)[1], run(a, x)[1])


def test_vmap():
    inputs = scan_inputs(9, {"state"})
    a, x = np.float32(inputs["a"]), np.float32(inputs["x"])
    h = jax.vmap(lambda a, x: linear_scan(a[None], x[None])[0][0])(a, x)
    assert_close(h, linear_scan(a, x)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": np.ones((2, 5, 3))}, "a must be .* got \\(2, 5, 3\\)"),
        ({"a": np.ones((2, 4), np.float32)}, "a must be"),
        ({"x": np.ones((2, 0, 3), np.float32)}, "x must be without an empty axis"),
        ({"x": np.ones(4, np.float32)}, "x must be \\[B, L"),
        ({"x": np.ones((2, 4, 3), np.int32)}, "x must be floating point"),
        ({"initial_state": np.ones((2, 4), np.float32)}, "initial_state must be"),
        (
            {"initial_state": np.ones((2, 3), np.complex64)},
            "initial_state must be real",
        ),
        ({"reset": np.ones((2, 3), bool)}, "reset must be"),
        ({"reset": np.ones((2, 4), np.int32)}, "reset must be bool, got int32"),
        ({"backend": "fast"}, "backend must be .* 'fast'; .*'xla': can run"),
    ],
)
def test_bad_input(change, words):
    good = {"a": np.ones((2, 4, 3), np.float32), "x": np.ones((2, 4, 3), np.float32)}
    good = {k: jnp.asarray(v) for k, v in good.items()}
    with pytest.raises(ValueError, match=f"linear_scan: {words}"):
        linear_scan(**{**good, **change})


def test_memory_of_the_backward_pass_is_linear():
    def gradient(a, x):
        return jax.grad(lambda a, x: jnp.sum(linear_scan(a, x)[0] ** 2), (0, 1))(a, x)

    sizes = []
    for length in (512, 1024):
        shape = jax.ShapeDtypeStruct((2, length, 64), jnp.float32)
        sizes.append(temporary_bytes(gradient, shape, shape))
    nbytes = 2 * 1024 * 64 * 4
    assert sizes[1] < 2.2 * sizes[0]
    assert sizes[1] < 3 * nbytes

    constant = jax.ShapeDtypeStruct((64,), jnp.float32)
    small = jax.jit(lambda a, x: gradient(a, x)[0])
    assert temporary_bytes(small, constant, shape) < 3 * nbytes


def bank_inputs(length, options, kind="complex"):
    variant = f"{kind}, dt" if "dt" in options else kind
    return inputs_of("contracted_scan", variant, length, options)


BANK_OPTIONS = [
    frozenset({"dt", "state", "reset", "reverse"}),
    *OPTIONS,
    frozenset({"dt"}),
    frozenset({"state", "reverse"}),
]


@product(kind=["complex", "real"], length=[150, 1, 7, 64, 1000], options=BANK_OPTIONS)
def test_contracted_scan_equals_definition(kind, length, options):
    check(
        contracted_scan,
        bank_inputs(length, options, kind),
        "float32",
        "xla",
        reverse="reverse" in options,
        return_transition=length <= 150,
    )


@product(dtype=["float64", "bfloat16"], options=BANK_OPTIONS[:2])
def test_contracted_scan_in_other_dtypes(dtype, options):
    check(
        contracted_scan,
        bank_inputs(150, options, "complex" if dtype == "float64" else "real"),
        dtype,
        "xla",
        reverse="reverse" in options,
        return_transition=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [set(), {"reset"}, {"dt", "reset"}])
def test_two_contracted_calls_compose(options, reverse):
    with jax.enable_x64(True):
        inputs = bank_inputs(140, options | {"state"})
        if "reset" in options:
            inputs["reset"][0] = False
        split_equals_whole(contracted_scan, inputs, {"u", "dt", "reset"}, 70, reverse)


def test_contracted_scan_is_the_contraction_of_the_scan():
    with jax.enable_x64(True):
        inputs = bank_inputs(90, {"state"})
        log_a, b, c, u = (inputs[k] for k in ("log_a", "b", "c", "u"))
        state = inputs["initial_state"]
        h, last = jax.jit(linear_scan)(np.exp(log_a), b * u[..., None], state)
        y, final = jax.jit(contracted_scan)(log_a, b, c, u, None, state)
        assert_close((y, final), (np.sum(c * h, -1).real, last))


def test_whole_steps_repeat_the_input():
    with jax.enable_x64(True):
        inputs = bank_inputs(6, {"state"})
        state = inputs.pop("initial_state")
        dt = np.array([[1, 3, 0, 2, 1, 4], [2, 0, 0, 1, 5, 1]], float)
        inputs["dt"] = dt
        run = jax.jit(contracted_scan)
        y, final = run(**inputs, initial_state=state)
        for row in range(2):
            times = dt[row].astype(int)
            long = np.repeat(inputs["u"][row : row + 1], times, 1)
            repeated = {**inputs, "u": long, "dt": None}
            y2, final2 = run(**repeated, initial_state=state[row : row + 1])
            at = np.cumsum(times) - 1
            assert_close((y[row], final[row : row + 1]), (y2[0, at], final2))


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-6, 1e-3, 0.3, 0.99, 1.01, 3.0])
def test_hold_is_accurate_down_to_zero(size):
    """Value and derivatives of w = expm1(dt z) / expm1(z), by its power series."""
    from kernels.linear_scan import hold

    def exact(order, z):
        terms = range(60)
        if order == 0:
            return sum(z**k / float(np.prod(np.arange(1.0, k + 2))) for k in terms)
        return sum(
            (k + 1) * z**k / float(np.prod(np.arange(1.0, k + 3))) for k in terms
        )

    for angle in (0.0, 1.0, np.pi / 2, np.pi):
        for dtype, limit in (("complex64", 1e-6), ("complex128", 1e-14)):
            with jax.enable_x64(dtype == "complex128"):
                z = jnp.asarray(size * np.exp(1j * angle), dtype)
                value, slope = jax.jvp(hold.phi, (z,), (jnp.ones_like(z),))
                z = complex(z)
                assert abs(complex(value) - exact(0, z)) < limit * abs(exact(0, z))
                assert abs(complex(slope) - exact(1, z)) < limit * 4


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradients_at_no_decay_and_no_time(kind):
    inputs = bank_inputs(7, {"dt", "state"}, kind)
    inputs["log_a"][:, 0] = 0
    inputs["dt"][:, ::2] = 0
    # the definition in float64 is itself exact only where |log_a| is not tiny
    check(contracted_scan, inputs, "float32", "xla")


@pytest.mark.slow
def test_a_constant_decay_is_not_rounded_once_for_all_steps():
    """Modes that forget nothing: a rounding of their decay would be raised to 2^17."""
    rng = np.random.default_rng(0)
    length, shape = 2**17 + 33, (2, 3)
    log_a = -(10.0 ** rng.uniform(-7, -5, shape)) + 3j * rng.uniform(size=shape)
    b, c, state = rng.normal(size=(3, *shape)) + 1j * rng.normal(size=(3, *shape))
    u = rng.normal(size=(1, length, 2))
    single = [x.astype(np.complex64) for x in (log_a, b, c, state[None])]

    def both(log_a, b, c, state, u):
        def loss(*inputs):
            y, final = contracted_scan(*inputs[:3], u, None, inputs[3])
            return jnp.mean(y**2) + jnp.sum(final.real**2), (y, final)

        gradient = jax.value_and_grad(loss, range(4), has_aux=True)
        (_, results), gradients = gradient(log_a, b, c, state)
        return results, gradients

    actual = jax.jit(both)(*single, u.astype(np.float32))
    with jax.enable_x64(True):
        double = (x.astype(np.complex128) for x in single)
        expected = jax.jit(both)(*double, u.astype(np.float32).astype(float))
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], kind="gradient")


@pytest.mark.slow
def test_contracted_memory_is_linear_and_without_modes():
    batch, channels, modes = 2, 8, 64

    def gradient(log_a, b, c, u, dt):
        def loss(*arguments):
            return jnp.sum(contracted_scan(*arguments)[0] ** 2)

        return jax.grad(loss, range(4 if dt is None else 5))(log_a, b, c, u, dt)

    system = [jax.ShapeDtypeStruct((channels, modes), jnp.complex64)] * 3
    for with_dt in (False, True):
        sizes = []
        for length in (4096, 8192):
            u = jax.ShapeDtypeStruct((batch, length, channels), jnp.float32)
            dt = jax.ShapeDtypeStruct((batch, length), jnp.float32) if with_dt else None
            sizes.append(temporary_bytes(gradient, *system, u, dt))
        assert sizes[1] < 2.2 * sizes[0]
        assert sizes[1] < batch * 8192 * channels * modes * 8 / 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": np.ones((2, 4, 3), np.complex64)}, "u must be real"),
        ({"u": np.ones((2, 0, 3), np.float32)}, "u must be without an empty axis"),
        ({"log_a": np.ones((2, 4), np.float32)}, "log_a must be \\[H, N\\] with H = 3"),
        ({"b": np.ones((3, 3), np.float32)}, "b must be \\[H, N\\]"),
        ({"c": np.ones((3, 3), np.float32)}, "c must be \\[H, N\\]"),
        ({"dt": np.ones((2, 5), np.float32)}, "dt must be"),
        ({"dt": np.ones((2, 4), np.int32)}, "dt must be real floating"),
        ({"initial_state": np.ones((2, 3, 2), np.complex64)}, "initial_state must be"),
        ({"reset": np.ones((2, 4), np.float32)}, "reset must be bool"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
    ],
)
def test_contracted_bad_input(change, words):
    system = np.ones((3, 2), np.float32)
    good = {"log_a": -system, "b": system, "c": system,
            "u": np.ones((2, 4, 3), np.float32)}  # fmt: skip
    with pytest.raises(ValueError, match=f"contracted_scan: {words}"):
        contracted_scan(**{**good, **change})


def test_backends_are_named():
    assert list(BACKENDS) == ["triton", "pallas_tpu", "xla", "reference"]


@pytest.mark.parametrize(
    ("length", "kind", "at_each"),
    [
        (2**12, "real", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                (2**12, 2**16), ("real", "complex"), (False, True)
            )
            if case != (2**12, "real", False)
        ),
    ],
)
def test_transition_of_many_decays_near_one(kind, at_each, length):
    """The rounding of each is not raised to a power with it."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.2, 4, (1, length if at_each else 1, 3)) / length
    angles = rng.uniform(1, 2) if kind == "complex" else 0
    a = np.exp(-rates + 1j * angles * (kind == "complex"))
    a = a.astype(np.complex64) if kind == "complex" else a.real.astype(np.float32)
    x = np.zeros((1, length, 3), np.float32)

    @jax.jit
    def transition(a):
        return linear_scan(a, x, return_transition=True)[2]

    wide = a.astype(np.complex128)
    total = np.prod(wide, 1) if at_each else wide[:, 0] ** length
    assert_close(transition(a), total if kind == "complex" else total.real)
    (actual,) = jax.vjp(transition, a)[1](jnp.ones((1, 3), a.dtype))
    expected = total[:, None] / wide * (1 if at_each else length)
    expected = expected if kind == "complex" else expected.real
    assert_close(actual, expected, "gradient")
