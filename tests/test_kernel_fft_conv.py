"""fft_conv and butterfly_conv against their definitions."""

import math
import re
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
    temporary_bytes,
)

from kernels import (
    backend_report,
    block_sizes,
    butterfly_conv,
    compat,
    dft_factors,
    fft_conv,
)
from kernels.check.cases import OPERATIONS, Case
from kernels.fft_conv import choice, monarch, overlap_save, segmented, windows, xla
from kernels.tolerance import assert_close

BACKENDS = ["xla", "direct", "overlap_save", "monarch"]
SHORT_LENGTHS = [7, 1, 64]  # direct: one operation per tap or step
GATES = ("skip", "pre_gate", "post_gate")


def inputs_for(length, options, taps=None, channels=3, batch=2):
    """Beside u and k what `options` has: "state", "reset", "k_reverse" and GATES."""
    variant = "two-sided" if "k_reverse" in options else "gated"
    sizes = dict(K=length if taps is None else taps, H=channels, B=batch)
    arrays = inputs_of("fft_conv", variant, length, options, **sizes)
    absent = {*GATES} - {*options}
    return {name: x for name, x in arrays.items() if name not in absent}


@product(
    backend=["xla", "overlap_save", "monarch"],
    dtype=DTYPES,
    length=LENGTHS,
    options=OPTIONS,
)
def test_equals_definition(backend, dtype, length, options):
    inputs = inputs_for(length, options)
    check(fft_conv, inputs, dtype, backend, reverse="reverse" in options)


@product(dtype=DTYPES, length=SHORT_LENGTHS, options=OPTIONS)
def test_direct_equals_definition(dtype, length, options):
    inputs = inputs_for(length, options)
    check(fft_conv, inputs, dtype, "direct", reverse="reverse" in options)


@product(
    backend=BACKENDS,
    length=[30, 1, 2, 64],
    reset=[(), ("reset",)],
    reverse=[True, False],
)
def test_two_sided_with_gates(backend, length, reset, reverse):
    inputs = inputs_for(length, {"k_reverse", *GATES, *reset})
    check(fft_conv, inputs, "float64", backend, reverse=reverse)


@product(
    taps=[17, 1, 2, 5, 33, 90],
    backend=BACKENDS,
    options=[("state",), ("state", "reset"), ("k_reverse", "reset")],
)
def test_filters_shorter_and_longer_than_the_input(taps, backend, options):
    inputs = inputs_for(50, set(options), taps)
    check(fft_conv, inputs, "float64", backend)


@pytest.mark.parametrize("backend", ["direct", "monarch"])
def test_low_precision_without_options(backend):
    check(fft_conv, inputs_for(100, set()), "bfloat16", backend)


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
            cut = {k: v[:, part] if k in timed else v for k, v in inputs.items()}
            return compiled(**{**cut, "initial_state": state})

        compiled = jax.jit(partial(fft_conv, reverse=reverse))

        state = inputs["initial_state"]
        expected, final = run(slice(None), state)
        parts = [slice(0, cut), slice(cut, None)]
        if reverse:
            parts.reverse()
        first, middle = run(parts[0], state)
        second, last = run(parts[1], middle)
        joined = [second, first] if reverse else [first, second]
        assert_close((jnp.concatenate(joined, 1), last), (expected, final))


@pytest.mark.parametrize("two_sided", [(), ("k_reverse",)])
def test_reset_equals_separate_segments(two_sided):
    with jax.enable_x64(True):
        inputs = inputs_for(70, {"state", *two_sided})
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
    changed = u.copy()
    changed[:, 25:] += 100
    assert_close(fft_conv(changed, k)[0][:, :25], fft_conv(u, k)[0][:, :25])


@pytest.mark.parametrize("reset", [False, True])
def test_memory_of_the_backward_pass_is_linear(reset):
    def gradient(u, k, reset):
        def loss(u, k):
            return jnp.sum(fft_conv(u, k, reset=reset)[0] ** 2)

        return jax.grad(loss, (0, 1))(u, k)

    sizes = []
    for length in (512, 1024):
        u = jax.ShapeDtypeStruct((2, length, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((8, length), jnp.float32)
        flags = jax.ShapeDtypeStruct((2, length), jnp.bool_) if reset else None
        sizes.append(temporary_bytes(gradient, u, k, flags))
    assert sizes[1] < 2.4 * sizes[0]
    # with resets each of the log2(L) levels has its own buffers
    assert sizes[1] < (50 if reset else 20) * 2 * 1024 * 8 * 4


@pytest.mark.parametrize("poison", [np.nan, 1e6])
def test_segments_do_not_reach_each_other(poison):
    """Not even by rounding: nothing of one enters a sum of another."""
    inputs = inputs_for(700, {"reset"})
    u, k = (np.float32(inputs[name]) for name in ("u", "k"))
    inside = np.cumsum(inputs["reset"], 1) == 20
    run = jax.jit(lambda u: fft_conv(u, k, reset=inputs["reset"])[0])
    changed = np.where(inside[..., None], np.float32(poison), u)
    y, clean = np.asarray(run(changed)), np.asarray(run(u))
    assert inside.any() and (y[~inside] == clean[~inside]).all()


@pytest.mark.slow
@product(
    taps_sizes=[(200, 4, 16, 3), (30, 2, 2, 5), (7, 8, 8, 2), (200, 2, 4, 2)],
    backend=["xla", "monarch"],
)
def test_resets_on_many_levels(monkeypatch, taps_sizes, backend):
    """Every combination of matrices, groups and a short reach, at a small length."""
    taps, *sizes = taps_sizes
    for name, size in zip(("NEAR", "BLOCK", "GROUP"), sizes, strict=True):
        monkeypatch.setattr(segmented, name, size)
    inputs = inputs_for(120, {"reset"}, taps, channels=2)
    inputs["reset"] &= np.random.default_rng(0).uniform(size=(2, 120)) < 0.4

    def op(u, k, reset, backend):  # compiled for these sizes alone
        return fft_conv(u, k, reset=reset, backend=backend)

    check(op, {name: inputs[name] for name in ("u", "k", "reset")}, "float64", backend)


@product(pieces=[(2, 40), (40, 40), (10**3, 10**3)], reset=[("reset",), ()])
def test_large_inputs_are_taken_in_pieces(monkeypatch, pieces, reset):
    """Channel by channel, and example by example where a channel is too large."""
    monkeypatch.setattr(windows, "MOST", pieces[0])
    monkeypatch.setattr(windows, "CACHED", pieces[1])
    inputs = inputs_for(20, {"state", *reset}, 12, channels=6, batch=4)

    def op(**inputs):
        return fft_conv(**inputs)

    check(op, inputs, "float64", "xla")


def test_more_than_four_gigabytes_compile_to_small_transforms():
    """No plan of an FFT beyond 32-bit sizes: 8 GB in, 1 GB at a time."""
    u = jax.ShapeDtypeStruct((4, 2**21, 256), jnp.float32)
    k = jax.ShapeDtypeStruct((256, 2**21), jnp.float32)
    run = jax.jit(lambda u, k: fft_conv(u, k, backend="xla")[0])
    text = run.lower(u, k).compile().as_text()
    shapes = re.findall(r"= c64\[([0-9,]+)\][^=]* fft\(", text)
    assert shapes
    for shape in shapes:
        assert math.prod(map(int, shape.split(","))) * 8 < 1.01 * 2**30


@pytest.mark.parametrize(
    "taps_start", [(5, 0), (5, 4), (30, 29), (30, 12), (64, 0)], ids=str
)
def test_overlap_save_streams_blocks(monkeypatch, taps_start):
    taps, start = taps_start
    monkeypatch.setattr(overlap_save, "SHORTEST", 16)
    monkeypatch.setattr(overlap_save, "OVERHEAD", 2)
    monkeypatch.setattr(windows, "CACHED", 600)
    rng = np.random.default_rng(taps)
    v, k = rng.standard_normal((2, 3, 331)), rng.standard_normal((3, taps))
    count = 331 - start
    with jax.enable_x64(True):
        *found, expected = (
            jax.jit(partial(_with_gradients, partial(f, start=start, count=count)))(
                v, k
            )
            for f in (overlap_save.window, overlap_save.by_matmuls, xla.window)
        )
        for actual in found:
            assert_close(actual, expected)


def _with_gradients(f, *arguments):
    y, pull = jax.vjp(f, *arguments)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


ORDERS = [(24, 15), (8, 4, 6), (3, 5, 7), (2, 3, 5, 4), (5, 1), (1, 6), (64,)]


@pytest.mark.parametrize("sizes", ORDERS, ids=str)
def test_block_fft_is_the_fft_in_permuted_order(sizes):
    points = math.prod(sizes)
    x = np.random.default_rng(points).standard_normal((2, points))
    odd = np.exp(-1j * np.pi * np.arange(points) / points)  # frequencies k + 1/2
    order = np.arange(points).reshape(sizes[::-1]).transpose().ravel()

    def transform(x):
        X = monarch.inner(monarch.outer(x, sizes, 0, False), sizes[1:], False)
        back = monarch.inner_inverse(X, sizes[1:], False)
        return X, monarch.outer_inverse(back, sizes, 0, points, False)

    with jax.enable_x64(True):
        (re, im), back = jax.jit(transform)(x)
        expected = np.fft.fft(odd * x)[:, order].reshape(2, sizes[0], -1)[
            :, : (sizes[0] + 1) // 2
        ]
        assert_close(np.asarray(re) + 1j * np.asarray(im), expected)
        assert_close(back, x)


@product(
    sizes=[(4, 3, 5, 2), (12, 10), (5, 4, 6)],
    window=[(20, 41), (0, 61), (49, 12)],
)
def test_block_convolution_of_every_order(sizes, window):
    """Four factors are the form in three passes; odd sizes, windows at either end."""
    start, count = window
    rng = np.random.default_rng(0)
    v, k = rng.standard_normal((2, 3, 61)), rng.standard_normal((3, 50))

    def block(v, k):
        return monarch.circular(v, k, sizes, start, count, False)

    with jax.enable_x64(True):
        actual, expected = (
            jax.jit(partial(_with_gradients, f))(v, k)
            for f in (block, partial(xla.window, start=start, count=count))
        )
        assert_close(actual, expected)


@pytest.mark.parametrize("columns", [1, 15, 32])
@pytest.mark.parametrize("heads", [(), (3,)], ids=str)
def test_matrices_are_filled_up_for_a_gpu(columns, heads):
    """To a round number of columns, of which nothing is seen."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((*heads, 5, 7)).astype(np.float32)
    x = rng.standard_normal((2, 3, 4, 7, columns)).astype(np.float32)
    with compat.lowering_for("gpu"):
        y = monarch.matmul(matrix, x, low=False)
        text = str(jax.make_jaxpr(partial(monarch.matmul, low=False))(matrix, x))
    assert ("16]" in text) == (columns == 15)
    heads = "h" if heads else ""
    assert_close(y, np.einsum(f"{heads}kn,bhpnm->bhpkm", matrix, x))


@pytest.mark.parametrize(
    ("length", "row"), [(37, 2**15), (299, 2**15), (301, 256)], ids=str
)
def test_whole_tiles_on_a_tpu(length, row, monkeypatch):
    """Other factors, and one matmul for several; computed here all the same."""
    monkeypatch.setattr(monarch, "ROW", row)
    inputs = inputs_for(length, {"state", *GATES})
    with compat.lowering_for("tpu"):
        assert monarch.sizes_of(2 * length)[-1] == monarch.LANES
        check(fft_conv, inputs, "float64", "monarch")


@pytest.mark.parametrize("variant", OPERATIONS["butterfly_conv"].variants)
def test_a_butterfly_on_a_tpu(variant):
    """Matrices of a DFT, learned, per channel; computed here all the same."""
    operation = OPERATIONS["butterfly_conv"]
    inputs = operation.inputs(Case(variant, 37))
    with compat.lowering_for("tpu"):
        check(operation.call, inputs, "float64", "monarch")


@pytest.mark.parametrize(
    "length_taps",
    [pytest.param((1200, 1200), marks=pytest.mark.slow), (60, 60), (700, 150)],
    ids=str,
)
def test_resets_on_a_tpu(length_taps):
    """Blocks of whole tiles, all halves in one loop, transforms of several at once;
    computed here all the same."""
    length, taps = length_taps
    inputs = inputs_for(length, {"reset", "state"}, taps, channels=2)
    with compat.lowering_for("tpu"):
        check(fft_conv, inputs, "float64", "monarch")
        u, k = (np.float32(inputs[name]) for name in ("u", "k"))
        inside = np.cumsum(inputs["reset"], 1) == 2

        @jax.jit
        def run(u):
            op = partial(fft_conv, reset=inputs["reset"], backend="monarch")
            y, pull = jax.vjp(lambda u: op(u, k)[0], u)
            return y, *pull(u)

        bad = run(np.where(inside[..., None], np.float32(np.nan), u))
        for poisoned, clean in zip(bad, run(u), strict=True):
            poisoned, clean = np.asarray(poisoned), np.asarray(clean)
            assert (poisoned[~inside] == clean[~inside]).all()
            assert np.isnan(poisoned[inside]).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [2**16, 2**20], ids=str)
def test_three_passes_over_a_long_sequence(length):
    """As the FFT, in temporary memory of a few inputs."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((1, length, 2)).astype(np.float32)
    k = (rng.standard_normal((2, length)) / 100).astype(np.float32)
    assert len(block_sizes(2 * length)) == 4

    def run(u, k, backend):
        return _with_gradients(lambda u, k: fft_conv(u, k, backend=backend)[0], u, k)

    actual, expected = (
        jax.jit(partial(run, backend=backend))(u, k) for backend in ("monarch", "xla")
    )
    assert_close(actual, expected, "gradient")
    assert temporary_bytes(partial(run, backend="monarch"), u, k) < 40 * u.nbytes


@pytest.mark.parametrize("points", [1, 2, 3, 9, 100, 1023, 4095, 131071, 8388607])
def test_block_sizes_hold_the_points_with_little_to_spare(points):
    for order in (None, 1, 2, 3, 4):
        total = math.prod(block_sizes(points, order))
        assert points <= total <= 1.3 * points + 30


CHOICES = {
    "few taps": ((2, 4096, 3), 16, False, "cpu", "direct", "K=16 taps"),
    "few steps": ((2, 1, 3), 4096, True, "cpu", "direct", "against L=1"),
    "no state": ((2, 9, 3), 4096, False, "cpu", "direct", "against L=9"),
    "one FFT": ((2, 4096, 3), 4096, False, "cpu", "xla", "overlap_save: K=4096 taps"),
    "short": ((1, 2**18, 3), 64, False, "cpu", "overlap_save", "K=64 taps against L=2"),
    "tpu": ((2, 4096, 3), 4096, False, "tpu", "monarch", "XLA's FFT is slow"),
    "short, tpu": ((1, 2**18, 3), 64, False, "tpu", "monarch", "XLA's FFT is slow"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_is_in_the_open(name):
    shape, taps, state, platform, expected, words = CHOICES[name]
    u = jax.ShapeDtypeStruct(shape, jnp.float32)
    k = jax.ShapeDtypeStruct((shape[2], taps), jnp.float32)
    tail = None
    if state:
        tail = jax.ShapeDtypeStruct((shape[0], taps - 1, shape[2]), jnp.float32)
    with compat.lowering_for(platform):
        advice = choice.advice(u, k, tail, None)
        assert (
            next((name for name, (fits, _) in advice.items() if fits), "xla")
            == expected
        )
    if platform != "cpu":
        assert words in advice[expected][1]
        return
    jax.eval_shape(fft_conv, u, k, tail)
    backend, reason = backend_report()["fft_conv"]
    assert backend == expected and words in reason


# FlashButterfly.


def butterfly(u, k, k_reverse=None, skip=None, backend=None, **factors):
    """`butterfly_conv` with factors u_0, u_1, ..., k_0, k_1, ... by name."""
    lists = (
        [factors[name] for name in sorted(factors) if name.startswith(first)]
        for first in ("u_", "k_")
    )
    return butterfly_conv(u, k, *lists, k_reverse=k_reverse, skip=skip, backend=backend)


def butterfly_inputs(length, sizes, options, taps=None, channels=3):
    """Factors near the DFT's; those with an even place of its own for each channel."""
    inputs = inputs_for(length, options, taps, channels)
    arrays = dict(inputs)
    rng = np.random.default_rng(length)
    for i, factor in enumerate(dft_factors(sizes)):
        for name, per_channel in (("u", i % 2 == 0), ("k", i % 2 == 1)):
            shape = ((channels,) if per_channel else ()) + factor.shape
            noise = 0.1 * rng.standard_normal(shape)
            arrays[f"{name}_{i}"] = np.asarray(factor, np.float64) + noise
    return arrays


@pytest.mark.slow
@product(
    dtype=["float64", "float32", "bfloat16"],
    sizes=[(6, 4, 2), (4, 2, 3, 2)],
    options=[("k_reverse", "skip")],
)
def test_butterfly_equals_definition(dtype, sizes, options):
    inputs = butterfly_inputs(19, sizes, {*options})
    check(butterfly, inputs, dtype, "monarch")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(5, 8), (40,), (3, 2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 19])
def test_butterfly_of_any_order_without_options(sizes, length):
    check(butterfly, butterfly_inputs(length, sizes, set()), "float64", "monarch")


@product(sizes=[(8, 12), (4, 3, 5, 2)], two_sided=[True, False])
def test_butterfly_begins_as_the_fft_convolution(sizes, two_sided):
    moving = inputs_for(37, {"skip"} | ({"k_reverse"} if two_sided else set()))
    with jax.enable_x64(True):
        factors = dft_factors(sizes, jnp.float64)

        def learned(**inputs):
            return butterfly_conv(inputs.pop("u"), inputs.pop("k"), factors, factors,
                                  **inputs)  # fmt: skip

        def gradients(f):
            def run(moving):
                y = f(**moving)
                return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)), y

            return jax.jit(jax.value_and_grad(run, has_aux=True))(moving)

        actual = gradients(learned)
        assert_close(actual, gradients(lambda **x: fft_conv(**x)[0]))


def test_butterfly_keeps_no_step_for_its_gradient():
    u, k = np.ones((2, 1024, 4), np.float32), np.ones((4, 1024), np.float32)
    factors = dft_factors(block_sizes(2048))

    def residuals(u, k, factors):
        pull = jax.vjp(lambda *a: butterfly_conv(*a, factors), u, k, factors)[1]
        return jax.tree.leaves(pull)

    arrays = jax.eval_shape(residuals, u, k, factors)
    assert sum(x.size for x in arrays) < 4 * (u.size + k.size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": np.ones((2, 4), np.float32)}, "u must be"),
        ({"k": np.ones((4, 3), np.float32)}, "k must be \\[H, K\\] with H = 3"),
        ({"k": np.ones((3, 5), np.int32)}, "k must be real"),
        ({"u_factors": []}, "u_factors must hold at least one"),
        ({"u_factors": [np.ones((3, 3), np.float32)]}, "u_factors\\[0\\] must be"),
        (
            {"k_factors": [np.ones((2, 3, 3, 2), np.float32)]},
            "k_factors\\[0\\] must be",
        ),
        ({"k_factors": dft_factors((4, 2))}, "k_factors must have the sizes"),
        ({"k_reverse": np.ones((3, 9), np.float32)[:, :0]}, "k_reverse must be"),
        ({"u": np.ones((2, 6, 3), np.float32)}, "at least L \\+ .* = 10 points"),
        ({"skip": np.ones(2, np.float32)}, "skip must be"),
        ({"backend": "xla"}, "backend must be one of .*, got 'xla'"),
    ],
)
def test_butterfly_bad_input(change, words):
    factors = dft_factors((2, 4))
    good = {
        "u": np.ones((2, 4, 3), np.float32),
        "k": np.ones((3, 5), np.float32),
        "u_factors": factors,
        "k_factors": factors,
    }
    with pytest.raises(ValueError, match=f"butterfly_conv: .*{words}"):
        butterfly_conv(**{**good, **change})


@pytest.mark.parametrize("call", [lambda: block_sizes(0), lambda: dft_factors([2, 0])])
def test_bad_sizes(call):
    with pytest.raises(ValueError, match="must be an integer >= 1, got 0"):
        call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": np.ones((2, 0, 3), np.float32)}, "u must be without an empty axis"),
        ({"u": np.ones((2, 4, 3), np.complex64)}, "u must be real"),
        ({"k": np.ones((4, 3), np.float32)}, "k must be \\[H, K\\] with H = 3"),
        ({"k": np.ones((3, 5), np.complex64)}, "k must be real"),
        ({"k_reverse": np.ones((3, 0), np.float32)}, "k_reverse must be \\[H, K\\]"),
        ({"initial_state": np.ones((2, 3, 3), np.float32)}, "initial_state must be"),
        ({"skip": np.ones(4, np.float32)}, "skip must be"),
        ({"pre_gate": np.ones((2, 3, 3), np.float32)}, "pre_gate must be"),
        ({"post_gate": np.ones((2, 3, 3), np.float32)}, "post_gate must be"),
        ({"reset": np.ones((2, 5), bool)}, "reset must be"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
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
