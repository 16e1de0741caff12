"""Pallas kernels without a TPU: computed in interpret mode, and lowered for one."""

from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check

from kernels import backend_report, blocks, compat
from kernels.check import conformance
from kernels.check.cases import DTYPES, OPERATIONS, Case, covering


class Kernel(NamedTuple):
    """How the pallas_tpu backend of one operation is tried.

    size: of the small arrays, for its entry in OPERATIONS.
    variants: of OPERATIONS, those whose kernels differ; the others are slow tests.
    constants: {module: {name: value}} that make several blocks of them on every axis.
    refused: sizes that the backend does not take, and words of the reason.
    not_taken: variants that it does not take.
    """

    size: dict[str, int]
    variants: tuple[str, ...]
    constants: dict[str, dict[str, int]]
    refused: tuple[dict[str, int], str] | None = None
    not_taken: tuple[str, ...] = ()


LENGTH = 40  # two blocks of 16 steps and a half
# two blocks of channels, of which the last hangs over
NARROW = {"kernels.blocks": {"LANES": 128, "ELEMENTS": 16 * 128}}

KERNELS = {
    "linear_scan": Kernel(
        {"B": 2, "D": 135}, ("real", "complex a", "complex x", "constant a"), NARROW
    ),
    "selective_scan": Kernel(
        {"B": 2, "D": 135, "N": 9},
        ("skip",),
        {"kernels.selective_scan.pallas_tpu": {"STEPS": 16, "STATE": 1}},
        ({"N": 129}, "takes at most 128 modes, got 129"),
    ),
    "chunked_scan": Kernel(
        {"B": 2, "H": 4, "G": 2, "K": 5, "V": 3},
        ("scalar decay", "delta rule, scalar decay"),
        {"kernels.chunked_scan.pallas_tpu": {"CHUNK": 16, "LANES": 1}},
        not_taken=("vector decay", "delta rule, vector decay"),
    ),
    "short_conv": Kernel(
        {"B": 2, "H": 135, "W": 4},
        ("bias",),
        NARROW,
        ({"W": 65}, "takes at most 64 taps, got 65"),
    ),
}


def operation(name, **size):
    return replace(OPERATIONS[name], small=KERNELS[name].size | size)


@pytest.fixture
def small_blocks(monkeypatch):
    def make(name):
        for module, constants in KERNELS[name].constants.items():
            for constant, value in constants.items():
                monkeypatch.setattr(import_module(module), constant, value)

    return make


def tried(cases_of):
    """Parametrises by the (case, dtype) that `cases_of(operation)` gives."""
    return pytest.mark.parametrize(
        ("name", "case", "dtype"),
        [
            pytest.param(
                name, case, dtype, id=f"{name}-{case}-{dtype}".replace(" ", "_")
            )
            for name in KERNELS
            for case, dtype in cases_of(operation(name))
        ],
    )


def some_cases(op):
    variants = KERNELS[op.name].variants
    yield Case(variants[0], LENGTH), "bfloat16"
    yield Case(variants[-1], LENGTH, True, True, True), "float64"


def every_variant(op):
    for i, variant in enumerate(KERNELS[op.name].variants):
        yield Case(variant, LENGTH, True, True, i % 2 == 0), "float64"


def more_cases(op):
    for *case, dtype in covering(list(op.product((LENGTH, 1, 7, 64), DTYPES))):
        if case[0] not in KERNELS[op.name].not_taken:
            yield Case(*case), dtype


def long_cases(op):
    yield Case(op.variants[0], 1000, True, True, True), "float32"


@tried(some_cases)
def test_equals_definition(name, case, dtype, small_blocks):
    small_blocks(name)
    compare(operation(name), case, dtype)


@pytest.mark.slow
@tried(every_variant)
def test_variants_equal_definition(name, case, dtype, small_blocks):
    small_blocks(name)
    compare(operation(name), case, dtype)


@pytest.mark.slow
@tried(more_cases)
def test_all_options_equal_definition(name, case, dtype, small_blocks):
    small_blocks(name)
    compare(operation(name), case, dtype)


@pytest.mark.slow
@tried(long_cases)
def test_equals_definition_in_whole_blocks(name, case, dtype):
    compare(operation(name), case, dtype)


def compare(op, case, dtype):
    inputs, static = op.inputs(case), op.static(case)
    check(op.call, inputs, dtype, "pallas_tpu", **static)


def passes(op, case, dtype, wide=False):
    return conformance.passes(op, case, dtype, "pallas_tpu", wide)


@pytest.mark.parametrize("name", KERNELS)
def test_small_arrays_are_several_blocks(name, small_blocks, monkeypatch):
    small_blocks(name)
    grids, call = [], compat.pallas_tpu_call

    def recorded(kernel, *, grid, **options):
        grids.append(grid)
        return call(kernel, grid=grid, **options)

    monkeypatch.setattr(compat, "pallas_tpu_call", recorded)
    op = operation(name)
    _, both, shapes = passes(op, Case(op.variants[0], LENGTH), "float32")
    jax.eval_shape(both, *shapes)
    assert len(grids) == 2
    assert all(size > 1 for grid in grids for size in grid)


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [("float32", False), ("bfloat16", False), ("float32", True)],
    ids=["float32", "bfloat16", "float32-x64"],
)
@pytest.mark.parametrize("name", KERNELS)
def test_lowers_for_tpu(name, dtype, x64):
    op = operation(name)
    for variant in {op.variants[0], KERNELS[name].variants[-1]}:
        case = Case(variant, 1000, True, True, True)
        with jax.enable_x64(x64), compat.lowering_for("tpu"):
            forward, both, shapes = passes(op, case, dtype, wide=True)
            assert tpu_kernels(forward, shapes) == 1
            assert tpu_kernels(both, shapes) == 2


@pytest.mark.parametrize(
    ("groups", "lanes", "programs"),
    [(4, 6, 2), (2, 6, 2), (1, 6, 2), (1, 3, 4), (4, 12, 1), (4, 7, 4)],
)
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("scalar decay", marks=pytest.mark.slow),
        "delta rule, scalar decay",
    ],
)
def test_heads_of_one_program(variant, groups, lanes, programs, monkeypatch):
    """Of one group and of several, whole groups and parts of them; in tiles of their
    own where too many would have to be together."""
    module = import_module("kernels.chunked_scan.pallas_tpu")
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "LANES", lanes)
    monkeypatch.setattr(module, "MOST", 4 if lanes != 7 else 3)
    sizes = {"B": 1, "H": 4, "G": groups, "K": 6 if groups == 2 else 3, "V": 3}
    op = replace(OPERATIONS["chunked_scan"], small=sizes)
    grids, call = [], compat.pallas_tpu_call

    def recorded(kernel, *, grid, **options):
        grids.append(grid)
        return call(kernel, grid=grid, **options)

    monkeypatch.setattr(compat, "pallas_tpu_call", recorded)
    length = 20 + groups + lanes  # each its own: jit knows nothing of the constants
    inputs = op.inputs(Case(variant, length, True, True))
    check(op.call, inputs, "float64", "pallas_tpu")  # without the transition's columns
    assert {grid[1] for grid in grids} == {programs}


def tpu_kernels(function, shapes):
    traced = jax.jit(function).trace(*shapes)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return text.count("@tpu_custom_call")


@pytest.mark.parametrize("name", KERNELS)
def test_default_on_a_tpu_and_what_it_refuses(name):
    def default(op, dtype="float32", backend=None):
        case = Case(op.variants[0], 8)
        shapes, static = passes(op, case, dtype)[2][0], op.static(case)
        jax.eval_shape(lambda x: op.call(**x, **static, backend=backend), shapes)
        return backend_report()[name][0]

    assert default(operation(name)) == "xla"
    with compat.lowering_for("tpu"):
        assert default(operation(name)) == "pallas_tpu"
        with jax.enable_x64(True):
            assert default(operation(name), "float64") == "xla"
            with pytest.raises(ValueError, match="'pallas_tpu': a TPU has no float64"):
                default(operation(name), "float64", "pallas_tpu")
        if KERNELS[name].refused is not None:
            size, words = KERNELS[name].refused
            large = operation(name, **size)
            assert default(large) == "xla"
            with pytest.raises(ValueError, match=f"'pallas_tpu': {words}"):
                default(large, backend="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("length", [40, 150])  # one block, and rows of blocks
def test_long_convolution(length, dtype, monkeypatch):
    module = import_module("kernels.fft_conv.pallas_tpu")
    monkeypatch.setattr(module, "BLOCK", 256)
    op = replace(OPERATIONS["fft_conv"], small={"B": 2, "H": 2})
    compare(op, Case("gated", length, state=True), dtype)
    compare(op, Case("two-sided", length), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_convolution_lowers_for_tpu(dtype):
    op = replace(OPERATIONS["fft_conv"], wide={"B": 2, "H": 256, "K": 1000})
    with compat.lowering_for("tpu"):
        forward, both, shapes = passes(op, Case("gated", 1000), dtype, wide=True)
        assert tpu_kernels(forward, shapes) == 1
        assert tpu_kernels(both, shapes) == 2


@pytest.mark.parametrize(
    ("channels", "width"),
    [(1, 1), (200, 200), (512, 512), (640, 128), (768, 384), (700, 512), (1536, 512)],
)
def test_blocks_fit_tiles(channels, width):
    assert blocks.lanes(channels, 512) == width
    for length in (1, 16, 100, 100_000):
        steps = blocks.steps(length, width)
        assert steps % blocks.GROUP == 0
        assert steps * width <= blocks.ELEMENTS
        assert steps >= min(length, 128)


def test_interpret_mode_shows_what_is_not_written():
    """Outputs begin as NaN there, so a block that is never written cannot pass."""

    def forgetful(x, y):
        y[:8] = x[:8]

    x = jnp.ones((16, 128))
    spec = blocks.pl.BlockSpec((16, 128), lambda i: (0, 0))
    y = compat.pallas_tpu_call(
        forgetful,
        grid=(1,),
        semantics=("parallel",),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x)
    assert np.isfinite(y[:8]).all()
    assert np.isnan(y[8:]).all()
