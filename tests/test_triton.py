"""Triton kernels without a GPU: computed in Triton's interpreter, and compiled to
machine code for an H100 or H200.

The interpreter must be asked for before anything is imported, so each operation is
computed in a process of its own, which is this file as a script.
"""

import itertools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import check

from kernels import (
    cauchy,
    chunked_scan,
    compat,
    fft_conv,
    linear_scan,
    selective_scan,
    short_conv,
    vandermonde,
    vandermonde_transpose,
)
from kernels.check import machine_code

pytest.importorskip("triton", reason="not installed: pip install -e '.[test]'")

SWITCHES = ("initial_state", "reset", "reverse")


class Case(NamedTuple):
    """Arrays in float64, rounded to `dtype`, and the other arguments."""

    inputs: dict
    static: dict
    dtype: str = "float64"

    def __str__(self):
        shapes = (f"{name} {x.shape}" for name, x in self.inputs.items())
        return f"{self.dtype}, {', '.join(shapes)}, {self.static}"


class Kernel(NamedTuple):
    """How the triton backend of one operation is tried.

    call: the operation.
    cases: some for the interpreter, tiny: it takes seconds for what a GPU does in
        microseconds. All of them where the argument is True.
    sizes: real ones to compile for; name -> {argument: (shape, dtype) or a number}.
    small: constants of the backend's modules, {module: {name: value}}, for which tiny
        arrays are several tiles and programs.
    """

    call: Callable
    cases: Callable[[bool], Iterator[Case]]
    sizes: dict[str, dict]
    small: dict[str, dict] = {}  # noqa: RUF012  nobody changes it


def switched(make, full, *variants) -> Iterator[Case]:
    """Cases of `make(rng, *variant)`, which gives the arrays and other arguments, with
    initial state, reset and reverse on and off where they exist.

    All on for every variant, and for the first all off, and all on in bfloat16; if
    `full`, every combination for the first and all off for every variant.
    """
    on, off = (True,) * len(SWITCHES), (False,) * len(SWITCHES)
    for number, variant in enumerate(variants):
        choices = [(on, "float64")]
        if number == 0 or full:
            choices.append((off, "float64"))
        if number == 0:
            choices.append((on, "bfloat16"))
        if number == 0 and full:
            choices += [(on, "float32"), (off, "float32")]
            every = itertools.product((True, False), repeat=len(SWITCHES))
            choices += [(some, "float64") for some in every if some not in (on, off)]
        for choice, dtype in choices:
            wanted = dict(zip(SWITCHES, choice, strict=True))
            inputs, static = make(np.random.default_rng(number), *variant)
            inputs = {k: x for k, x in inputs.items() if wanted.get(k, True)}
            yield Case(inputs, {**static, "reverse": wanted["reverse"]}, dtype)


def plain(make, full, *variants) -> Iterator[Case]:
    """Cases of `make(rng, *variant)`; if `full`, the first in float32 too."""
    for number, variant in enumerate(variants):
        for dtype in ("float64", "float32") if full and number == 0 else ("float64",):
            yield Case(*make(np.random.default_rng(number), *variant), dtype)


def normal(rng, *shape, kind="r"):
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if kind == "c" else x


def resets(rng, batch, length):
    return rng.uniform(size=(batch, length)) < 0.15


def scan(rng, kinds, length, a_shape=None, shape=(5,)):
    """kinds: of a and x, "r" or "c"; a_shape with "B" and "L" for the batch and the
    length, or None for one decay per value."""
    batch = 2
    full = (batch, length, *shape)
    named = {"B": batch, "L": length}
    sizes = full if a_shape is None else tuple(named.get(n, n) for n in a_shape)
    a = rng.uniform(0.3, 0.999, sizes)
    if kinds[0] == "c":
        a = a * np.exp(1j * rng.uniform(-3, 3, sizes))
    state = normal(rng, batch, *shape, kind="c" if "c" in kinds else "r")
    return {
        "a": a,
        "x": normal(rng, *full, kind=kinds[1]),
        "initial_state": state,
        "reset": resets(rng, batch, length),
    }, {"return_transition": True}


def scan_cases(full):
    # tiles are of 8 steps and 16 values
    more = [
        ("cc", 20),
        ("rc", 9, ("B", "L", 1)),
        ("cr", 1, (1, "L", 5)),
        ("rr", 17, ("B", "L", 3, 1), (3, 4)),
        ("cc", 12, (1, "L", 1, 3, 1), (2, 3, 2)),
    ]
    everywhere = [
        ("cc", 20, (20,), (20,)),
        ("rr", 7, (1, 1, 1, 4), (3, 4)),
        ("rc", 20, ("B", "L", 2, 1, 2), (2, 3, 2)),
        ("cc", 1),
        ("rr", 100),
    ]
    return switched(scan, full, ("rr", 20), *more, *(everywhere if full else ()))


def selective(rng, length, channels, modes, batch=2):
    shape = (batch, length, channels)
    return {
        "u": normal(rng, *shape),
        "dt": rng.uniform(0.01, 0.5, shape),
        "A": -rng.uniform(0.1, 2, (channels, modes)),
        "B": normal(rng, batch, length, modes),
        "C": normal(rng, batch, length, modes),
        "skip": normal(rng, channels),
        "initial_state": normal(rng, batch, channels, modes),
        "reset": resets(rng, batch, length),
    }, {"return_transition": True}


def selective_cases(full):
    # tiles are of 16 and 8 steps, blocks of 8 channels or more, segments of 16 steps
    more = [(7, 20, 4)]
    everywhere = [(1, 3, 3), (40, 3, 1), (19, 3, 2), (20, 3, 17), (50, 70, 4, 1)]
    return switched(selective, full, (24, 9, 3), *more, *(everywhere if full else ()))


def convolution(rng, length, channels, width, bias=True):
    batch = 2
    made = {
        "u": normal(rng, batch, length, channels),
        "w": normal(rng, channels, width),
        "initial_state": normal(rng, batch, width - 1, channels),
        "reset": resets(rng, batch, length),
    }
    return made | ({"bias": normal(rng, channels)} if bias else {}), {}


def convolution_cases(full):
    # tiles are of 4 steps, programs of 8
    more = [(3, 5, 7, False), (9, 2, 1)]
    everywhere = [(1, 3, 4), (40, 70, 3), (17, 1, 2, False), (40, 3, 9)]
    return switched(convolution, full, (25, 5, 4), *more, *(everywhere if full else ()))


def filters(rng, kind, length, modes):
    made = {"c": normal(rng, 2, 3, modes, kind=kind), "log_z": nodes(rng, kind, modes)}
    return made, {"length": length}


def moments(rng, kind, length, modes):
    return {"u": normal(rng, 2, 3, length), "log_z": nodes(rng, kind, modes)}, {}


def nodes(rng, kind, modes):
    log_z = -rng.uniform(0.001, 0.5, (3, modes))
    return log_z + 1j * rng.uniform(-3.2, 3.2, log_z.shape) if kind == "c" else log_z


def filter_cases(make):
    # tiles are of 8 taps and 8 nodes
    def cases(full):
        everywhere = [("c", 64, 3), ("r", 65, 16), ("c", 8, 8)] if full else []
        return plain(make, full, ("c", 21, 9), ("r", 7, 3), ("c", 1, 2), *everywhere)

    return cases


def poles(rng, length, modes, sums):
    dt = 10 ** rng.uniform(-3, -1, (2, 1))
    z = dt * (-0.5 + 1j * np.arange(1, modes + 1) ** 2)
    return {"v": normal(rng, sums, 2, modes, kind="c"), "z": z}, {"length": length}


def pole_cases(full):
    # tiles are of 8 frequencies, 4 nodes and 2 sums
    everywhere = [(64, 4, 2), (33, 9, 1), (2, 3, 4)] if full else []
    return plain(poles, full, (40, 5, 3), (1, 2, 1), *everywhere)


def scan_sizes():
    long = (8, 4096, 256)
    states = (64, 1024, 256)
    return {
        "complex64": {
            "a": (states, jnp.complex64),
            "x": (states, jnp.complex64),
            "reset": (states[:2], bool),
        },
        "float32": {"a": (long, jnp.float32), "x": (long, jnp.float32)},
        "bfloat16": {"a": (long, jnp.bfloat16), "x": (long, jnp.bfloat16)},
        "constant complex64": {
            "a": ((64,), jnp.complex64),
            "x": ((8, 4096, 64), jnp.complex64),
        },
    }


def selective_sizes():
    def size(dtype, batch=8, length=4096, channels=256, modes=16, **more):
        return {
            "u": ((batch, length, channels), dtype),
            "dt": ((batch, length, channels), dtype),
            "A": ((channels, modes), jnp.float32),
            "B": ((batch, length, modes), dtype),
            "C": ((batch, length, modes), dtype),
            **more,
        }

    return {
        "float32, reset": size(jnp.float32, reset=((8, 4096), bool)),
        "float32": size(jnp.float32),
        "bfloat16": size(jnp.bfloat16),
        "wide": size(jnp.float32, channels=1536, length=2000),
        "64 modes": size(jnp.float32, modes=64),
        "1 mode": size(jnp.float32, modes=1),
    }


def convolution_sizes():
    def size(dtype, width, **more):
        u = ((8, 4096, 256), dtype)
        return {"u": u, "w": ((256, width), jnp.float32), **more}

    more = {"bias": ((256,), jnp.float32), "reset": ((8, 4096), bool)}
    return {
        "bfloat16, all": size(jnp.bfloat16, 4, **more),
        "bfloat16": size(jnp.bfloat16, 4),
        "float32": size(jnp.float32, 4),
        "8 taps": size(jnp.float32, 8),
    }


def filter_sizes(dtype):
    z = ((256, 32), dtype)
    return {"c": z, "log_z": z, "length": 4096}


def moment_sizes(dtype):
    return {"u": ((8, 256, 4096), jnp.float32), "log_z": ((256, 32), dtype)}


def attention(rng, length, heads, keys, values, decay="scalar", delta=False):
    """heads: (groups, heads); decay: "scalar", "constant" or None."""
    batch, (groups, heads) = 2, heads
    k = normal(rng, batch, length, groups, keys)
    made = {
        "q": normal(rng, batch, length, groups, keys),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(rng, batch, length, heads, values),
        "initial_state": normal(rng, batch, heads, keys, values),
        "reset": resets(rng, batch, length),
    }
    if decay is not None:
        shape = (heads,) if decay == "constant" else (batch, length, heads)
        made["log_decay"] = -rng.uniform(0, 0.5, shape)
    if delta:
        made["beta"] = rng.uniform(0, 1, (batch, length, heads))
    return made, {"return_transition": True}


def attention_cases(full):
    # chunks are of 32 tokens, of 16 where the products are not of bfloat16
    more = [(20, (1, 2), 5, 17, "scalar", True)]
    everywhere = [
        (1, (1, 1), 3, 2),
        (16, (2, 2), 16, 16, "constant"),
        (35, (1, 3), 20, 40, None, True),
        (7, (2, 2), 3, 3, None),
    ]
    return switched(
        attention, full, (37, (2, 4), 5, 20), *more, *(everywhere if full else ())
    )


def long_convolution(rng, length, taps, two_sided=False):
    batch, channels = 2, 2
    made = {
        "u": normal(rng, batch, length, channels),
        "k": normal(rng, channels, taps),
        "skip": normal(rng, channels),
        "pre_gate": normal(rng, batch, length, channels),
    }
    if two_sided:
        made["k_reverse"] = normal(rng, channels, taps)
    else:
        made["initial_state"] = normal(rng, batch, taps - 1, channels)
    return made, {}


def long_convolution_cases(full):
    # blocks are of 256 points, real ones in bfloat16 of 1024
    more = [(150, 170)]
    everywhere = [(100, 60, True), (1, 1), (300, 290, True), (120, 700)]
    return switched(
        long_convolution, full, (90, 80), *more, *(everywhere if full else ())
    )


def attention_sizes():
    def size(width, **more):
        shape = (2, 4096, 8)
        return {
            "q": ((*shape[:2], 4, width), jnp.bfloat16),
            "k": ((*shape[:2], 4, width), jnp.bfloat16),
            "v": ((*shape, 64), jnp.bfloat16),
            "log_decay": (shape, jnp.float32),
            **more,
        }

    reset = {"reset": ((2, 4096), bool)}
    return {
        "bfloat16": size(64),
        "bfloat16, delta rule": size(64, beta=((2, 4096, 8), jnp.float32)),
        "bfloat16, reset": size(64, **reset),
        "bfloat16, 128 keys": size(128),
    }


def long_convolution_sizes():
    def size(length):
        return {
            "u": ((8, length, 768), jnp.bfloat16),
            "k": ((768, length), jnp.float32),
        }

    return {"bfloat16, L=512": size(512), "bfloat16, L=1024": size(1024)}


def in_both(sizes):
    return {"complex64": sizes(jnp.complex64), "float32": sizes(jnp.float32)}


def pole_sizes():
    def size(sums):
        z = ((256, 32), jnp.complex64)
        return {"v": ((sums, *z[0]), jnp.complex64), "z": z, "length": 4096}

    return {"4 sums": size(4), "1 sum": size(1)}


KERNELS = {
    "linear_scan": Kernel(
        linear_scan,
        scan_cases,
        scan_sizes(),
        {"kernels.linear_scan.triton": {"TILE": 8}},
    ),
    "selective_scan": Kernel(
        selective_scan,
        selective_cases,
        selective_sizes(),
        {"kernels.selective_scan.triton": {"SEGMENT": 16}},
    ),
    "short_conv": Kernel(
        short_conv,
        convolution_cases,
        convolution_sizes(),
        {"kernels.short_conv.triton": {"SIZE": 128, "TILES": 2}},
    ),
    "vandermonde": Kernel(
        vandermonde,
        filter_cases(filters),
        in_both(filter_sizes),
        {"kernels.vandermonde.triton": {"LOW": 4, "HIGH": 2, "TILES": 2}},
    ),
    "vandermonde_transpose": Kernel(
        vandermonde_transpose,
        filter_cases(moments),
        in_both(moment_sizes),
        {"kernels.vandermonde.triton": {"LOW": 4, "HIGH": 2, "TILES": 2}},
    ),
    "chunked_scan": Kernel(
        chunked_scan,
        attention_cases,
        attention_sizes(),
        {"kernels.chunked_scan.triton_decay": {"CHUNK": 32}},
    ),
    "fft_conv": Kernel(
        fft_conv,
        long_convolution_cases,
        long_convolution_sizes(),
        {"kernels.fft_conv.triton": {"BLOCK": 1024}},
    ),
    "cauchy": Kernel(
        cauchy,
        pole_cases,
        pole_sizes(),
        {"kernels.cauchy.triton": {"POINTS": 8, "TILES": 2, "SUMS": 2}},
    ),
}


def interpret(name, full):
    """In the interpreter's process: the error of every case that fails."""
    kernel, failed = KERNELS[name], []
    for module, constants in kernel.small.items():
        for constant, value in constants.items():
            setattr(import_module(module), constant, value)
    for case in kernel.cases(full):
        try:
            check(kernel.call, case.inputs, case.dtype, "triton", **case.static)
        except Exception:
            failed.append(f"{case}\n{traceback.format_exc(limit=-3)}")
    return failed


def in_the_interpreter(name, full=False):
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__, name, *(["full"] if full else [])],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# tried quickly by their compilation alone
SLOW = {"vandermonde", "vandermonde_transpose", "cauchy", "selective_scan"}
SLOW |= {"chunked_scan", "linear_scan"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in KERNELS
    ],
)
def test_equals_definition(name):
    in_the_interpreter(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_all_options_equal_definition(name):
    in_the_interpreter(name, full=True)


# the first size of every operation is quick to try, the others are slow
SIZES = [
    pytest.param(
        kernel.call,
        shapes,
        id=f"{name}-{size}".replace(" ", "_"),
        marks=[pytest.mark.slow] if number else [],
    )
    for name, kernel in KERNELS.items()
    for number, (size, shapes) in enumerate(kernel.sizes.items())
]


@pytest.mark.parametrize(("call", "shapes"), SIZES)
def test_compiles_without_spilling(call, shapes):
    """Every kernel of the forward and the backward pass, for sm_90."""
    for kernel_call in calls(call, shapes):
        made = machine_code.compiled(kernel_call)
        assert made["spilled_bytes"] == 0, (kernel_call.kernel.__name__, made)


@pytest.mark.slow
def test_chunked_scan_compiles_with_resets_in_float32():
    """Rows of a tile are chosen, which flags in registers cannot do there; a few
    registers are spilled."""
    shape = (2, 1000, 4)
    shapes = {name: ((*shape, 64), jnp.float32) for name in "qkv"}
    shapes |= {"log_decay": (shape, jnp.float32), "reset": (shape[:2], bool)}
    for kernel_call in calls(chunked_scan, shapes):
        assert machine_code.compiled(kernel_call)["registers"] <= 255


def calls(call, shapes):
    """The different calls of Triton kernels that both passes make."""
    static = {name: x for name, x in shapes.items() if isinstance(x, int)}
    arrays = {
        name: jax.ShapeDtypeStruct(*shape)
        for name, shape in shapes.items()
        if name not in static
    }
    fixed = {name: x for name, x in arrays.items() if x.dtype == bool}
    moving = {name: x for name, x in arrays.items() if name not in fixed}

    def both(moving, fixed):
        def forward(moving):
            return call(**moving, **fixed, **static, backend="triton")

        values, pull = jax.vjp(forward, moving)
        return pull(jax.tree.map(jnp.ones_like, values))

    with compat.lowering_for("gpu"), compat.recorded() as made:
        jax.eval_shape(both, moving, fixed)
    different = []
    for one in made:
        if one not in different:
            different.append(one)
    names = {one.kernel.__name__ for one in different}
    assert len(names) > 1, f"one kernel for both passes: {names}"
    return different


if __name__ == "__main__":
    found = interpret(sys.argv[1], "full" in sys.argv[2:])
    print("\n".join(found))
    sys.exit(bool(found))
