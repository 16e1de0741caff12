"""chunked_scan against its definition, a loop over time, and known special cases."""

from functools import partial

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
    rounded,
    temporary_bytes,
    widened,
)

from kernels import chunked_scan
from kernels.chunked_scan import delta, xla
from kernels.tolerance import assert_close, error

FORMS = [
    "scalar decay",
    "delta rule, vector decay",
    "vector decay",
    "delta rule, scalar decay",
]
# decays that are broadcast
PLAINER = ["constant decay", "delta rule, no decay", "no decay"]


def inputs_for(form, length, options=("state", "reset"), groups=2, heads=4, width=8):
    sizes = dict(G=groups, H=heads, K=width, V=6)
    return inputs_of("chunked_scan", form, length, options, **sizes)


def arrays(inputs):
    return {name: jnp.asarray(x) for name, x in inputs.items()}


def compare(inputs, dtype, options=(), transition=True):
    static = dict(reverse="reverse" in options, return_transition=transition)
    check(chunked_scan, inputs, dtype, "xla", **static)


@product(form=FORMS, dtype=DTYPES, length=LENGTHS)
def test_equals_definition(form, dtype, length):
    inputs = inputs_for(form, length)
    if "beta" in inputs:  # at any length as strong as it may be
        inputs["beta"] = np.random.default_rng(1).uniform(0, 1, inputs["beta"].shape)
    compare(inputs, dtype)


@pytest.mark.parametrize("form", PLAINER)
def test_plainer_forms(form):
    compare(inputs_for(form, 5), "float64")


@pytest.mark.slow
@product(form=PLAINER, dtype=DTYPES, length=LENGTHS)
def test_plainer_forms_at_all_lengths(form, dtype, length):
    compare(inputs_for(form, length), dtype)


@pytest.mark.slow
@product(options=OPTIONS, form=FORMS[:2])
def test_options_over_several_chunks(options, form):
    compare(inputs_for(form, 70, options), "float64", options)


@product(form=["delta rule, scalar decay", "vector decay"], heads=[(1, 3), (4, 4)])
def test_groups(form, heads):
    groups, heads = heads
    compare(inputs_for(form, 12, groups=groups, heads=heads), "float64")


def jitted(inputs, **static):
    """Compiled anew, for what is changed under it."""
    return jax.jit(lambda x: chunked_scan(**x, **static))(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["scalar decay", "delta rule, vector decay"])
def test_chunk_size_is_free(form, monkeypatch):
    with jax.enable_x64(True):
        inputs = arrays(inputs_for(form, 20))
        expected = jitted(inputs, backend="reference")
        for size in (1, 4, 16):
            monkeypatch.setattr(xla, "SCALAR_CHUNK", size)
            monkeypatch.setattr(xla, "CHUNK", size)
            assert_close(jitted(inputs), expected)


@product(
    form=["scalar decay", "delta rule, scalar decay", "delta rule, vector decay"],
    reverse=[False, True],
)
def test_calls_compose(form, reverse):
    """Two calls in a row are one, in both directions, and so are their transitions."""
    inputs = arrays(inputs_for(form, 24))
    inputs["reset"] = inputs["reset"].at[0].set(False)  # a transition that is not 0
    static = dict(reverse=reverse, return_transition=True)
    o, final, transition = jitted(inputs, **static)
    state, total, parts = inputs["initial_state"], None, []
    pieces = [slice(0, 12), slice(12, 24)]
    for piece in pieces[::-1] if reverse else pieces:
        part = {k: x[:, piece] for k, x in inputs.items() if k != "initial_state"}
        out, state, change = jitted(part | {"initial_state": state}, **static)
        parts.append(out)
        if total is None:
            total = change
        else:
            total = change @ total if "delta" in form else change * total
    parts = parts[::-1] if reverse else parts
    assert np.any(np.asarray(transition))
    assert_close((jnp.concatenate(parts, 1), state, total), (o, final, transition))


@pytest.mark.parametrize(
    "form", ["scalar decay", "vector decay", "delta rule, vector decay"]
)
def test_transition_is_the_derivative_by_the_initial_state(form):
    with jax.enable_x64(True):
        inputs = arrays(inputs_for(form, 20, {"state"}, groups=1, heads=1))
        inputs["reset"] = jnp.zeros((2, 20), bool).at[1, 5].set(True)
        _, final, transition = jitted(inputs, return_transition=True)
        _, without = jitted({**inputs, "initial_state": 0 * inputs["initial_state"]})
        if form == "delta rule, vector decay":
            moved = transition @ inputs["initial_state"]
        else:
            extra = inputs["initial_state"].ndim - transition.ndim
            moved = transition[(...,) + (None,) * extra] * inputs["initial_state"]
        assert_close(final - without, moved)


# Special cases with a closed form, all without a loop over time.


def quadratic(weights, q, k, v):
    """o[i] = sum_j weights[i, j] (q[i] . k[j]) v[j], weights [..., L, L]."""
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k)
    return jnp.einsum("bhlm,bmhv->blhv", weights * scores, v)


def case(form, length=70, **options):
    return arrays(inputs_for(form, length, (), groups=4, **options))


def test_no_decay_is_causal_linear_attention():
    with jax.enable_x64(True):
        inputs = case("no decay")
        o, final = jitted(inputs)
        assert_close(o, quadratic(jnp.tril(jnp.ones((70, 70))), **inputs))
        assert_close(final, jnp.einsum("blhk,blhv->bhkv", inputs["k"], inputs["v"]))
        zero = jnp.zeros((2, 70, 4))
        assert_close(jitted({**inputs, "log_decay": zero}), (o, final))


def test_constant_decay_is_retention():
    with jax.enable_x64(True):
        inputs = case("constant decay")
        log_decay = inputs.pop("log_decay")
        lag = jnp.arange(70)[:, None] - jnp.arange(70)
        weights = jnp.tril(jnp.exp(log_decay)[:, None, None] ** lag)
        o, _ = jitted({**inputs, "log_decay": log_decay})
        assert_close(o, quadratic(weights, **inputs))


def test_scalar_decay_is_the_masked_quadratic_form():
    """SSD: M = L * (C B^T), L[i, j] = a[j+1] ... a[i]."""
    with jax.enable_x64(True):
        inputs = case("scalar decay")
        log_decay = inputs.pop("log_decay")
        total = jnp.cumsum(log_decay, 1).swapaxes(1, 2)
        weights = jnp.tril(jnp.exp(total[..., :, None] - total[..., None, :]))
        o, _ = jitted({**inputs, "log_decay": log_decay})
        assert_close(o, quadratic(weights, **inputs))


@pytest.mark.parametrize("form", ["scalar decay", "delta rule, scalar decay"])
def test_one_decay_for_all_channels(form):
    inputs = arrays(inputs_for(form, 20))
    wide = jnp.broadcast_to(inputs["log_decay"][..., None], (2, 20, 4, 8))
    assert_close(jitted({**inputs, "log_decay": wide}), jitted(inputs))


def test_delta_rule_with_orthonormal_keys_adds_beta_v():
    """Nothing is stored under a key before it comes, as long as there are new ones."""
    with jax.enable_x64(True):
        inputs = case("delta rule, scalar decay", length=40, width=40)
        basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
        inputs["k"] = jnp.broadcast_to(basis[None, :, None], inputs["k"].shape)
        actual = jitted(inputs)
        inputs["v"] = inputs["v"] * inputs.pop("beta")[..., None]
        assert_close(actual, jitted(inputs))


def test_delta_rule_with_one_key_replaces():
    """beta = 1 and always the same key: the state holds the last value only."""
    inputs = case("delta rule, no decay", length=70)
    inputs["k"] = jnp.broadcast_to(inputs["k"][:1, :1, :1], inputs["k"].shape)
    inputs["beta"] = jnp.ones_like(inputs["beta"])
    inputs["q"] = inputs["k"]
    o, final = jitted(inputs)
    assert_close(o, inputs["v"])
    expected = inputs["k"][:, -1, :, :, None] * inputs["v"][:, -1, :, None]
    assert_close(final, expected)


def test_inverse_where_powers_of_the_matrix_would_be_huge():
    """All ones below the diagonal: entries of its powers pass 1e17, the inverse has 1
    and -1."""
    A = jnp.tril(jnp.ones((1, 1, 64, 64)), -1)
    u = jax.jit(delta.solve)(A, jnp.eye(64)[None, None])
    np.testing.assert_array_equal(u[0, 0], jnp.eye(64) - jnp.eye(64, k=-1))


@pytest.mark.parametrize("form", ["scalar decay", "delta rule, vector decay"])
def test_tokens_that_do_not_exist(form):
    """No decay and no key, or no beta: the state passes."""
    inputs = inputs_for(form, 40)
    order = np.tile(np.arange(40), (2, 1))
    masked = np.random.default_rng(0).permuted(order, axis=1) < 16
    inputs["reset"][:] = False
    for name in ("log_decay", "beta" if "delta" in form else "k"):
        inputs[name][masked] = 0
    _, state = jitted(arrays(inputs))
    for name in inputs.keys() - {"initial_state"}:
        remaining = inputs[name][~masked]
        inputs[name] = remaining.reshape(2, 24, *remaining.shape[1:])
    assert_close(state, jitted(arrays(inputs))[1])


# Numerics.


@product(
    form=[
        "scalar decay",
        "vector decay",
        "delta rule, scalar decay",
        "delta rule, vector decay",
    ],
    decay=["mixed", "strong"],
    dtype=["float32", "float64"],
)
def test_extreme_decays_are_exact(form, decay, dtype):
    """Small decays after large ones, and nothing but large ones; gradients too."""
    inputs = inputs_for(form, 32 if decay == "strong" else 20)
    shape = inputs["log_decay"].shape
    rng = np.random.default_rng(3)
    if decay == "strong":
        inputs["log_decay"] = np.full(shape, -50.0)
    else:
        large = rng.choice([50.0, 1e3, 1e6, np.inf], shape)
        small = rng.uniform(0, 0.05, shape)
        inputs["log_decay"] = -np.where(rng.uniform(size=shape) < 0.2, large, small)
    # without the transition: in float64 still a number that float32 does not have
    compare(inputs, dtype, transition=False)


@product(
    form=["scalar decay", "delta rule, scalar decay", "vector decay"],
    decay=[-16, -1, -10, -30],
)
def test_gradient_of_a_strong_decay(form, decay):
    """What it changes is small, of what it keeps: a difference of sums would lose it.
    Over chunks and without a reset, so that nothing else has a gradient as large."""
    inputs = inputs_for(form, 70, ("state",), heads=2)
    shape = inputs["log_decay"].shape
    inputs["log_decay"] = decay - np.random.default_rng(0).uniform(0, 0.1, shape)
    compare(inputs, "float32", transition=False)


def test_infinite_decay_is_a_reset():
    inputs = inputs_for("scalar decay", 20)
    reset = inputs.pop("reset")
    decay = np.where(reset[..., None], -np.inf, inputs["log_decay"])
    with jax.enable_x64(True):
        actual, gradients = results(
            chunked_scan, widened({**inputs, "log_decay": decay})
        )
        expected, expected_gradients = results(
            chunked_scan, widened({**inputs, "reset": reset})
        )
        assert_close(actual, expected)
        assert_close(gradients, expected_gradients, "gradient")


@pytest.mark.slow
def test_mapped_twice():
    """Over batches of batches, with gradients: more axes than any layer has."""
    inputs = case("delta rule, scalar decay", length=5)
    stacked = {k: jnp.stack([jnp.stack([x, x / 2])] * 2) for k, x in inputs.items()}

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(chunked_scan(**x)[0] ** 2))(x)

    mapped = jax.jit(jax.vmap(jax.vmap(gradient)))(stacked)
    for i in range(2):
        one = jax.jit(gradient)(jax.tree.map(lambda x, i=i: x[0, i], stacked))
        actual = jax.tree.map(lambda x, i=i: x[1, i], mapped)
        assert_close(actual, one, "gradient")


def gradient_of(form, length):
    """The gradient function and its inputs, one batch, 4 heads of 64 by 64."""
    sizes = dict(B=1, G=4, H=4, K=64, V=64)
    inputs = rounded(inputs_of("chunked_scan", form, length, **sizes), "float32")
    return jax.grad(lambda x: jnp.sum(chunked_scan(**x)[0] ** 2)), inputs


@pytest.mark.parametrize(
    "form",
    ["scalar decay", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[1:])],
)
def test_memory_of_the_backward_pass_is_linear_and_without_states(form):
    sizes = [temporary_bytes(*gradient_of(form, length)) for length in (1024, 2048)]
    states = 2048 * 4 * 64 * 64 * 4
    assert sizes[1] < states / 8
    assert sizes[1] < 2.2 * sizes[0]


def test_program_does_not_grow_with_the_length():
    lines = []
    for length in (256, 4096):
        function, inputs = gradient_of("scalar decay", length)
        lines.append(jax.jit(function).lower(inputs).as_text().count("\n"))
    assert lines[0] == lines[1]


SHAPE = (2, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=jnp.ones(SHAPE)), r"v must be \[B, L, H, V\], got shape \(2, 5, 4\)"),
        (dict(v=jnp.ones((2, 0, 4, 6))), "v must be without an empty axis"),
        (dict(v=jnp.ones((*SHAPE, 6), int)), "v must be real floating point, got int"),
        (dict(q=jnp.ones(SHAPE)), r"q must be \[B, L, G, K\] with B = 2 and L = 5"),
        (dict(q=jnp.ones((2, 5, 3, 8))), "q must have a number of groups G that div"),
        (dict(q=jnp.ones((2, 5, 2, 8), complex)), "q must be real floating point, got"),
        (dict(k=jnp.ones((2, 5, 4, 8))), r"k must be \[B, L, G, K\] = \(2, 5, 2, 8\)"),
        (dict(log_decay=jnp.ones((2, 5))), r"log_decay must be \[H\] = \(4,\), \[B, L"),
        (dict(log_decay=jnp.ones((2, 5, 4, 6))), r"log_decay .*K\] = \(2, 5, 4, 8\)"),
        (dict(beta=jnp.ones((2, 5))), r"beta must be \[B, L, H\] = \(2, 5, 4\)"),
        (dict(initial_state=jnp.ones((2, 4, 6, 8))), r"initial_state must be .*8, 6\)"),
        (dict(reset=jnp.ones((2, 5))), "reset must be bool"),
        (dict(reset=jnp.ones((2, 4), bool)), r"reset must be \[B, L\] = \(2, 5\)"),
        (dict(backend="cuda"), "backend must be one of .*, got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    inputs = arrays(inputs_for("delta rule, scalar decay", 5))
    with pytest.raises(ValueError, match=message):
        chunked_scan(**{**inputs, **change})


def test_narrow_inputs_give_a_wide_state():
    inputs = {
        name: x if x.dtype == bool else x.astype(jnp.bfloat16)
        for name, x in arrays(inputs_for("scalar decay", 7)).items()
    }
    for backend in ("xla", "reference"):
        run = partial(chunked_scan, backend=backend)
        o, final = jax.eval_shape(run, **inputs)
        assert (o.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)


def test_one_token_is_one_step():
    inputs = arrays(inputs_for("delta rule, scalar decay", 1))
    del inputs["reset"]
    q, k = (jnp.repeat(inputs[name][:, 0], 2, 1) for name in "qk")
    beta, decay = inputs["beta"][:, 0, :, None], jnp.exp(inputs["log_decay"][:, 0])
    S = decay[..., None, None] * inputs["initial_state"]
    u = beta * (inputs["v"][:, 0] - jnp.einsum("bhk,bhkv->bhv", k, S))
    S = S + k[..., None] * u[..., None, :]
    o, final = jitted(inputs)
    assert_close((o[:, 0], final), (jnp.einsum("bhk,bhkv->bhv", q, S), S))
    assert error(final, inputs["initial_state"]) > 0.1


@pytest.mark.parametrize("length", [2**12, pytest.param(2**17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_slow_decay_of_a_state(delta, per_channel, length):
    """One decay at all times: its rounding is not that of a power of it."""
    rate = np.linspace(0.2, 2, 6).reshape(2, 3) / length
    g = -(rate if per_channel else rate[:, 0]).astype(np.float32)
    log_decay = np.broadcast_to(g, (1, length, *g.shape))
    zeros = np.zeros((1, length, 2, 3), np.float32)
    beta = zeros[..., 0] if delta else None
    state = np.ones((1, 2, 3, 3), np.float32)
    _, final, transition = jax.jit(
        lambda *x: chunked_scan(*x, return_transition=True, backend="xla")
    )(zeros, zeros, zeros, log_decay, beta, state)
    decay = np.exp(length * g.astype(np.float64))
    expected = np.broadcast_to(decay.reshape(1, 2, -1, 1), state.shape)
    assert_close(final, expected)
    if delta:
        assert_close(transition, expected * np.eye(3))
    else:
        assert_close(transition, decay[None])
