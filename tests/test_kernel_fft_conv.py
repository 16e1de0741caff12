"""fft_conv against its definition, a sum over lags."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import DTYPES, LENGTHS, OPTIONS, check, product, temporary_bytes

from kernels import fft_conv
from kernels.tolerance import assert_close

GATES = ("skip", "pre_gate", "post_gate")


def inputs_for(length, options, taps=None, channels=3, batch=2):
    taps = length if taps is None else taps
    rng = np.random.default_rng(length + 7 * taps)
    shape = (batch, length, channels)
    decay = np.exp(-np.arange(taps) / 20)
    made = {
        "u": rng.standard_normal(shape),
        "k": rng.standard_normal((channels, taps)) * decay,
        "initial_state": rng.standard_normal((batch, taps - 1, channels)),
        "reset": rng.uniform(size=shape[:2]) < 0.15,
        "k_reverse": rng.standard_normal((channels, taps)) * decay,
        "skip": rng.standard_normal(channels),
        "pre_gate": rng.standard_normal(shape),
        "post_gate": rng.standard_normal(shape),
    }
    wanted = {"u", "k", *options}
    if "state" in options and taps > 1:
        wanted.add("initial_state")
    return {name: x if name in wanted else None for name, x in made.items()}


@product(dtype=DTYPES, length=LENGTHS, options=OPTIONS)
def test_equals_definition(dtype, length, options):
    inputs = inputs_for(length, options)
    check(fft_conv, inputs, dtype, "xla", reverse="reverse" in options)


@product(length=[30, 1, 2, 64], reset=[("reset",), ()], reverse=[True, False])
def test_two_sided_with_gates(length, reset, reverse):
    inputs = inputs_for(length, {"k_reverse", *GATES, *reset})
    check(fft_conv, inputs, "float64", "xla", reverse=reverse)


@product(
    taps=[17, 1, 2, 5, 16, 33, 90],
    options=[("state", "reset"), ("state",), ("k_reverse", "reset")],
)
def test_filters_shorter_and_longer_than_the_input(taps, options):
    inputs = inputs_for(50, set(options), taps)
    check(fft_conv, inputs, "float64", "xla")


@pytest.mark.parametrize("row", [np.nan, 1e6])
def test_examples_do_not_reach_each_other(row):
    """Not even by rounding: no two of them may share a transform."""
    inputs = inputs_for(50, {"skip"})
    u = jnp.asarray(inputs["u"], jnp.float32)
    k, skip = (jnp.asarray(inputs[name], jnp.float32) for name in ("k", "skip"))
    alone, _ = fft_conv(u[1:], k, skip=skip)
    beside, _ = fft_conv(u.at[0].set(row), k, skip=skip)
    assert_close(beside[1:], alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_in_low_precision(dtype):
    inputs = inputs_for(20, {"state", "reset", *GATES})
    check(fft_conv, inputs, dtype, "reference")


@product(
    cut_taps=[(3, 8), (12, 8), (19, 30)], reverse=[True, False], reset=[("reset",), ()]
)
def test_two_calls_compose(cut_taps, reverse, reset):
    cut, taps = cut_taps
    with jax.enable_x64(True):
        inputs = inputs_for(20, {"state", *GATES, *reset}, taps)
        timed = {"u", "reset", "pre_gate", "post_gate"}

        def run(part, state):
            cut = {
                k: v[:, part] if k in timed and v is not None else v
                for k, v in inputs.items()
            }
            return compiled(**{**cut, "initial_state": state})

        compiled = jax.jit(partial(fft_conv, reverse=reverse))

        state = inputs["initial_state"]
        whole, final = run(slice(None), state)
        parts = [slice(0, cut), slice(cut, None)]
        if reverse:
            parts.reverse()
        first, middle = run(parts[0], state)
        second, last = run(parts[1], middle)
        joined = [second, first] if reverse else [first, second]
        assert_close((jnp.concatenate(joined, 1), last), (whole, final))


@pytest.mark.parametrize("two_sided", [(), ("k_reverse",)])
def test_reset_equals_separate_segments(two_sided):
    with jax.enable_x64(True):
        inputs = inputs_for(70, {"state", *two_sided})
        if two_sided:
            inputs["initial_state"] = None
        reset = np.zeros((2, 70), bool)
        reset[:, [0, 13, 14, 40]] = True
        run = jax.jit(fft_conv)
        y, final = run(**{**inputs, "reset": reset})
        rest = {**inputs, "initial_state": None}
        pieces = [(0, 13), (13, 14), (14, 40), (40, 70)]
        segments = [run(**{**rest, "u": inputs["u"][:, a:b]}) for a, b in pieces]
        assert_close(y, jnp.concatenate([y for y, _ in segments], 1))
        if not two_sided:
            assert_close(final, segments[-1][1])


def test_state_holds_the_gated_inputs():
    inputs = inputs_for(9, {"state", "pre_gate"}, 5)
    u, k, gate = (np.float32(inputs[name]) for name in ("u", "k", "pre_gate"))
    assert_close(fft_conv(u, k, pre_gate=gate)[1], (u * gate)[:, -4:])
    assert fft_conv(u, k[:, :1])[1].shape == (2, 0, 3)
    assert fft_conv(u, k, k_reverse=k)[1] is None
    assert_close(fft_conv(u, k, reverse=True)[1], u[:, :4])


def test_output_does_not_see_the_future():
    inputs = inputs_for(40, set())
    u, k = np.float32(inputs["u"]), np.float32(inputs["k"])
    later = u.copy()
    later[:, 25:] += 100
    assert_close(fft_conv(later, k)[0][:, :25], fft_conv(u, k)[0][:, :25])


@pytest.mark.parametrize("reset", [False, True])
def test_memory_of_the_backward_pass_is_linear(reset):
    def gradient(u, k, reset):
        def loss(u, k):
            return jnp.sum(fft_conv(u, k, reset=reset)[0] ** 2)

        return jax.grad(loss, (0, 1))(u, k)

    used = []
    for length in (512, 1024):
        u = jax.ShapeDtypeStruct((2, length, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((8, length), jnp.float32)
        flags = jax.ShapeDtypeStruct((2, length), jnp.bool_) if reset else None
        used.append(temporary_bytes(gradient, u, k, flags))
    assert used[1] < 2.4 * used[0]
    # with resets each of the log2(L) levels has its own buffers
    assert used[1] < (50 if reset else 20) * 2 * 1024 * 8 * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": np.ones((2, 0, 3), np.float32)}, "u must have length"),
        ({"u": np.ones((2, 4, 3), np.complex64)}, "u must be real"),
        ({"k": np.ones((4, 3), np.float32)}, "k must be \\[H, K\\] with H = 3"),
        ({"k": np.ones((3, 5), np.complex64)}, "k must be real"),
        ({"k_reverse": np.ones((3, 0), np.float32)}, "k_reverse must be \\[H, K\\]"),
        ({"initial_state": np.ones((2, 3, 3), np.float32)}, "initial_state must be"),
        ({"skip": np.ones(4, np.float32)}, "skip must be"),
        ({"pre_gate": np.ones((2, 3, 3), np.float32)}, "pre_gate must be"),
        ({"post_gate": np.ones((2, 3, 3), np.float32)}, "post_gate must be"),
        ({"reset": np.ones((2, 5), bool)}, "reset must be"),
        ({"backend": "fast"}, "unknown backend"),
        (
            {
                "initial_state": np.ones((2, 4, 3), np.float32),
                "k_reverse": np.ones((3, 5), np.float32),
            },
            "initial_state must be None with k_reverse",
        ),
    ],
)
def test_bad_input(change, words):
    good = {"u": np.ones((2, 4, 3), np.float32), "k": np.ones((3, 5), np.float32)}
    with pytest.raises(ValueError, match=f"fft_conv: {words}"):
        fft_conv(**{**good, **change})
