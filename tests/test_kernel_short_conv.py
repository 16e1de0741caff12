"""short_conv against its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import DTYPES, LENGTHS, OPTIONS, check, inputs_of, product

from kernels import short_conv
from kernels.tolerance import assert_close


def inputs_for(length, options, **sizes):
    variant = "bias" if "state" in options else "no bias"
    return inputs_of("short_conv", variant, length, options, **sizes)


@product(dtype=DTYPES, length=LENGTHS, options=OPTIONS)
def test_equals_definition(dtype, length, options):
    inputs = inputs_for(length, options)
    check(short_conv, inputs, dtype, "xla", reverse="reverse" in options)


@pytest.mark.parametrize("width", [1, 2, 9])
def test_widths(width):
    inputs = inputs_for(5, {"state", "reset"}, W=width)
    check(short_conv, inputs, "float64", "xla")
    check(short_conv, inputs, "float32", "reference", reverse=True)


def test_lag_zero_is_the_first_tap():
    u = np.zeros((1, 6, 1), np.float32)
    u[0, 2] = 1
    w = np.array([[1, 2, 3]], np.float32)
    assert_close(short_conv(u, w)[0][0, :, 0], np.float32([0, 0, 1, 2, 3, 0]))
    y, _ = short_conv(u, w, reverse=True)
    assert_close(y[0, :, 0], np.float32([3, 2, 1, 0, 0, 0]))


@product(cut=[1, 2, 5, 8], reverse=[True, False], reset=[True, False])
def test_two_calls_compose(cut, reverse, reset):
    with jax.enable_x64(True):
        inputs = inputs_for(9, {"state"} | ({"reset"} if reset else set()))
        u, reset, state = inputs["u"], inputs.get("reset"), inputs["initial_state"]

        def run(part, state):
            cuts = None if reset is None else reset[:, part]
            return compiled(u[:, part], inputs["w"], inputs["bias"], state, cuts)

        compiled = jax.jit(partial(short_conv, reverse=reverse))

        expected, final = run(slice(None), state)
        parts = [slice(0, cut), slice(cut, None)]
        if reverse:
            parts.reverse()
        first, middle = run(parts[0], state)
        second, last = run(parts[1], middle)
        joined = [second, first] if reverse else [first, second]
        assert_close((jnp.concatenate(joined, 1), last), (expected, final))


def test_reset_equals_separate_segments():
    inputs = inputs_for(12, {"state"})
    reset = np.zeros((2, 12), bool)
    reset[:, 5] = True
    u, w, bias, state = (
        np.float32(inputs[k]) for k in ("u", "w", "bias", "initial_state")
    )
    y, final = short_conv(u, w, bias, state, reset)
    first, _ = short_conv(u[:, :5], w, bias, state)
    second, last = short_conv(u[:, 5:], w, bias)
    assert_close((y, final), (jnp.concatenate([first, second], 1), last))


def test_state_is_float32_for_bfloat16():
    u = jnp.ones((1, 4, 2), jnp.bfloat16)
    y, final = short_conv(u, jnp.ones((2, 3)))
    assert (y.dtype, final.dtype, final.shape) == (jnp.bfloat16, jnp.float32, (1, 2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": np.ones((2, 0, 3), np.float32)}, "u must be without an empty axis"),
        ({"u": np.ones((2, 4), np.float32)}, "u must be \\[B, L, H\\]"),
        ({"u": np.ones((2, 4, 3), np.complex64)}, "u must be real"),
        ({"w": np.ones((2, 4), np.float32)}, "w must be \\[H, W\\] with H = 3"),
        ({"bias": np.ones(2, np.float32)}, "bias must be"),
        ({"initial_state": np.ones((2, 4, 3), np.float32)}, "initial_state must be"),
        ({"reset": np.ones((2, 5), bool)}, "reset must be"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
    ],
)
def test_bad_input(change, words):
    good = {"u": np.ones((2, 4, 3), np.float32), "w": np.ones((3, 4), np.float32)}
    with pytest.raises(ValueError, match=f"short_conv: {words}"):
        short_conv(**{**good, **change})
