"""selective_scan against its definition, a loop over time."""

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
    temporary_bytes,
)

from kernels import contracted_scan, selective_scan
from kernels.tolerance import assert_close, error


def inputs_for(length, options=(), **sizes):
    return inputs_of("selective_scan", "skip", length, options, **{"D": 3} | sizes)


@product(dtype=DTYPES, length=LENGTHS, options=OPTIONS)
def test_equals_definition(dtype, length, options):
    inputs = inputs_for(length, options)
    reverse = "reverse" in options
    check(selective_scan, inputs, dtype, "xla", reverse=reverse, return_transition=True)


@product(length=[33, 32, 97], options=[OPTIONS[4], OPTIONS[0]])
def test_lengths_about_a_chunk(length, options):
    """One chunk, and lengths that are no multiple of their chunk."""
    inputs = inputs_for(length, options)
    check(selective_scan, inputs, "float64", "xla", reverse="reverse" in options)


@pytest.mark.parametrize("reverse", [False, True])
def test_calls_compose(reverse):
    """Two calls in a row are one, in both directions, and so are their transitions."""
    inputs = {
        k: jnp.asarray(x, bool if x.dtype == bool else None)
        for k, x in inputs_for(50, {"state", "reset"}).items()
    }
    options = dict(reverse=reverse, return_transition=True)
    y, final, transition = selective_scan(**inputs, **options)
    state, total, parts = inputs["initial_state"], 1, []
    pieces = [slice(0, 21), slice(21, 50)]
    for piece in pieces[::-1] if reverse else pieces:
        part = {
            k: x[:, piece] if k in ("u", "dt", "B", "C", "reset") else x
            for k, x in inputs.items()
        }
        part["initial_state"] = state
        out, state, decay = selective_scan(**part, **options)
        parts.append(out)
        total = total * decay
    parts = parts[::-1] if reverse else parts
    assert_close((jnp.concatenate(parts, 1), state, total), (y, final, transition))


def test_constant_parameters_make_a_diagonal_system():
    """dt, B and C constant: exp(dt A) and dt B, a bank with the Euler input."""
    inputs = inputs_for(40)
    constant = {k: np.broadcast_to(inputs[k][:1, :1], inputs[k].shape) for k in "BC"}
    dt = np.full_like(inputs["dt"], 0.1)
    with jax.enable_x64(True):
        y, final = selective_scan(
            inputs["u"], dt, inputs["A"], *(jnp.asarray(constant[k]) for k in "BC")
        )
        b = 0.1 * np.tile(constant["B"][0, 0], (3, 1))
        c = np.tile(constant["C"][0, 0], (3, 1))
        expected = contracted_scan(
            *map(jnp.asarray, (0.1 * inputs["A"], b, c, inputs["u"]))
        )
        assert_close((y, final), expected)


def test_no_step_no_change_and_a_long_step_forgets():
    inputs = inputs_for(5, {"state"})
    still = {**inputs, "dt": 0 * inputs["dt"]}
    _, state = selective_scan(**_arrays(still))
    assert error(state, inputs["initial_state"]) < 1e-6
    forgetful = {**inputs, "dt": 0 * inputs["dt"] + 1e4, "u": 0 * inputs["u"]}
    _, state = selective_scan(**_arrays(forgetful))
    assert not np.any(np.asarray(state))


@pytest.mark.parametrize("dt", [1e-30, 1e4])
def test_extreme_steps(dt):
    """Nothing is divided by a decay of nearly 0 or by what is left of 1."""
    inputs = inputs_for(40, {"state"})
    inputs["dt"][:, ::3] = dt
    check(selective_scan, inputs, "float32", "xla")


def test_gradients_of_the_final_state_alone():
    inputs = inputs_for(40, {"state", "reset"})
    reset = inputs.pop("reset")

    def gradients(backend):
        def size(moving):
            final = selective_scan(**moving, reset=reset, backend=backend)[1]
            return jnp.sum(final**2)

        return jax.jit(jax.grad(size))(inputs)

    with jax.enable_x64(True):
        assert_close(gradients("xla"), gradients("reference"), "gradient")


def _arrays(inputs):
    return {k: jnp.asarray(x) for k, x in inputs.items()}


def test_memory_of_the_backward_pass_is_linear_and_without_modes():
    def bytes_at(length, modes=16):
        inputs = _arrays(inputs_for(length, B=1, D=64, N=modes))

        def gradient(inputs):
            return jax.grad(lambda p: jnp.sum(selective_scan(**p)[0] ** 2))(inputs)

        return temporary_bytes(gradient, inputs)

    states = 2048 * 64 * 16 * 4
    assert bytes_at(2048) < states / 4
    assert bytes_at(4096) < 2.2 * bytes_at(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=jnp.ones((2, 5))), r"u must be \[B, L, D\]"),
        (dict(u=jnp.ones((2, 5, 3), int)), "u must be real floating point, got int32"),
        (dict(dt=jnp.ones((2, 5))), r"dt must be \[B, L, D\] = \(2, 5, 3\)"),
        (dict(A=jnp.ones((4, 4))), r"A must be \[D, N\] with D = 3 as in u"),
        (dict(B=jnp.ones((2, 5, 3))), r"B must be \[B, L, N\] = \(2, 5, 4\)"),
        (dict(skip=jnp.ones(4)), r"skip must be \[D\] = \(3,\)"),
        (dict(initial_state=jnp.ones((2, 3, 3))), "initial_state must be"),
        (dict(reset=jnp.ones((2, 5))), "reset must be bool"),
        (dict(backend="cuda"), "backend must be one of .*, got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**_arrays(inputs_for(5)), **change})
