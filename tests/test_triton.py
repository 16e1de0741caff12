"""Triton kernels without a GPU: computed in Triton's interpreter, and compiled to
machine code for an H100 or H200.

The interpreter must be asked for before anything is imported, so each operation is
computed in a process of its own, which is this file as a script.
"""

import itertools
import math
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
from kernel_cases import check, check_one_narrow, real_arrays

from kernels import (
    cauchy,
    chunked_scan,
    fft_conv,
    linear_scan,
    selective_scan,
    short_conv,
    vandermonde,
    vandermonde_transpose,
)
from kernels.check import machine_code
from kernels.check.cases import OPERATIONS

pytest.importorskip("triton", reason="not installed: pip install -e '.[test]'")

SWITCHES = ("initial_state", "reset", "reverse")


class Arguments(NamedTuple):
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
    cases: Callable[[bool], Iterator[Arguments]]
    sizes: dict[str, dict]
    small: dict[str, dict] = {}  # noqa: RUF012  nobody changes it


def made(name, number, variant, length, sizes) -> dict:
    """The arrays of `kernels.check`; `sizes` are all that the operation has."""
    rng = np.random.default_rng(number)
    return OPERATIONS[name].make(rng, variant, length, sizes)


def switched(inputs, full, static) -> Iterator[Arguments]:
    """Cases of each of these dicts of arrays, with initial state, reset and reverse on
    and off where they exist.

    All on for every variant, and for the first all off, and all on in bfloat16; if
    `full`, every combination for the first and all off for every variant.
    """
    on, off = (True,) * len(SWITCHES), (False,) * len(SWITCHES)
    for number, arrays in enumerate(inputs):
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
            chosen = {k: x for k, x in arrays.items() if wanted.get(k, True)}
            yield Arguments(chosen, {**static, "reverse": wanted["reverse"]}, dtype)


def plain(inputs, full, static=lambda length: {}) -> Iterator[Arguments]:
    """Cases of each of these (length, dict of arrays); if `full`, the first in float32
    too."""
    for number, (length, arrays) in enumerate(inputs):
        for dtype in ("float64", "float32") if full and number == 0 else ("float64",):
            yield Arguments(arrays, static(length), dtype)


TRANSITION = {"return_transition": True}


def scan_cases(full):
    # tiles are of 8 steps and 16 values; a is one where its shape is, all where None
    some = [
        ("real", 20, (5,), None),
        ("complex", 20, (5,), None),
        ("complex x", 9, (5,), (2, 9, 1)),
        ("complex a", 1, (5,), (1, 1, 5)),
        ("real", 17, (3, 4), (2, 17, 3, 1)),
        ("complex", 12, (2, 3, 2), (1, 12, 1, 3, 1)),
    ]
    everywhere = [
        ("complex", 20, (20,), (20,)),
        ("real", 7, (3, 4), (1, 1, 1, 4)),
        ("complex x", 20, (2, 3, 2), (2, 20, 2, 1, 2)),
        ("complex", 1, (5,), None),
        ("real", 100, (5,), None),
    ]

    def scan(number, variant, length, shape, a_shape):
        sizes = {"B": 2, "D": math.prod(shape)}
        arrays = made("linear_scan", number, variant, length, sizes)
        for name in ("a", "x", "initial_state"):
            x = arrays[name]
            arrays[name] = x.reshape(*x.shape[:-1], *shape)
        if a_shape is not None:
            wide = (1,) * (2 + len(shape) - len(a_shape)) + a_shape
            arrays["a"] = arrays["a"][tuple(map(slice, wide))].reshape(a_shape)
        return arrays

    variants = some + (everywhere if full else [])
    inputs = [scan(number, *variant) for number, variant in enumerate(variants)]
    return switched(inputs, full, TRANSITION)


def selective_cases(full):
    # tiles are of 16 and 8 steps, blocks of 8 channels or more, segments of 16 steps
    some = [(24, 9, 3, 2), (7, 20, 4, 2)]
    everywhere = [
        (1, 3, 3, 2),
        (40, 3, 1, 2),
        (19, 3, 2, 2),
        (20, 3, 17, 2),
        (50, 70, 4, 1),
    ]
    inputs = [
        made("selective_scan", number, "skip", length, {"B": B, "D": D, "N": N})
        for number, (length, D, N, B) in enumerate(some + (everywhere if full else []))
    ]
    return switched(inputs, full, TRANSITION)


def convolution_cases(full):
    # tiles are of 4 steps, programs of 8
    some = [("bias", 25, 5, 4), ("no bias", 3, 5, 7), ("bias", 9, 2, 1)]
    everywhere = [
        ("bias", 1, 3, 4),
        ("bias", 40, 70, 3),
        ("no bias", 17, 1, 2),
        ("bias", 40, 3, 9),
    ]
    inputs = [
        made("short_conv", number, variant, length, {"B": 2, "H": H, "W": W})
        for number, (variant, length, H, W) in enumerate(
            some + (everywhere if full else [])
        )
    ]
    return switched(inputs, full, {})


def node_cases(name, static):
    # tiles are of 8 taps and 8 nodes
    def cases(full):
        some = [("complex", 21, 9), ("real", 7, 3), ("complex", 1, 2)]
        everywhere = [("complex", 64, 3), ("real", 65, 16), ("complex", 8, 8)]
        inputs = [
            (length, made(name, i, variant, length, {"B": 2, "R": 2, "H": 3, "N": N}))
            for i, (variant, length, N) in enumerate(
                some + (everywhere if full else [])
            )
        ]
        return plain(inputs, full, static)

    return cases


def pole_cases(full):
    # tiles are of 8 frequencies, 4 nodes and 2 sums, of the 4 there are
    some = [(40, 5, 3), (1, 2, 1)]
    everywhere = [(64, 4, 2), (33, 9, 1), (2, 3, 4)]
    inputs = []
    for number, (length, N, sums) in enumerate(some + (everywhere if full else [])):
        arrays = made("cauchy", number, "shared nodes", length, {"H": 2, "N": N})
        inputs.append((length, arrays | {"v": arrays["v"][:sums]}))
    return plain(inputs, full, lambda length: {"length": length})


def attention_cases(full):
    # chunks are of 32 tokens, of 16 where the products are not of bfloat16
    some = [
        ("scalar decay", 37, {"G": 2, "H": 4, "K": 5, "V": 20}),
        ("delta rule, scalar decay", 20, {"G": 1, "H": 2, "K": 5, "V": 17}),
    ]
    everywhere = [
        ("scalar decay", 1, {"G": 1, "H": 1, "K": 3, "V": 2}),
        ("constant decay", 16, {"G": 2, "H": 2, "K": 16, "V": 16}),
        ("delta rule, no decay", 35, {"G": 1, "H": 3, "K": 20, "V": 40}),
        ("no decay", 7, {"G": 2, "H": 2, "K": 3, "V": 3}),
    ]
    inputs = [
        made("chunked_scan", number, variant, length, {"B": 2, **sizes})
        for number, (variant, length, sizes) in enumerate(
            some + (everywhere if full else [])
        )
    ]
    return switched(inputs, full, TRANSITION)


def long_convolution_cases(full):
    # blocks are of 256 points, real ones in bfloat16 of 1024
    some = [("gated", 90, 80), ("gated", 150, 170)]
    everywhere = [
        ("two-sided", 100, 60),
        ("gated", 1, 1),
        ("two-sided", 300, 290),
        ("gated", 120, 700),
    ]
    inputs = [
        made("fft_conv", number, variant, length, {"B": 2, "H": 2, "K": K})
        for number, (variant, length, K) in enumerate(
            some + (everywhere if full else [])
        )
    ]
    for arrays in inputs:
        del arrays["reset"]  # segments are not for this backend
    return switched(inputs, full, {})


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
            "skip": ((channels,), jnp.float32),
            **more,
        }

    return {
        "float32, reset": size(jnp.float32, reset=((8, 4096), bool)),
        "float32": size(jnp.float32),
        "float32, no skip": size(jnp.float32, skip=None),
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


def attention_sizes():
    def size(width, dtype=jnp.bfloat16, heads=8, **more):
        shape = (2, 4096, heads)
        return {
            "q": ((*shape[:2], 4, width), dtype),
            "k": ((*shape[:2], 4, width), dtype),
            "v": ((*shape, width), dtype),
            "log_decay": (shape, jnp.float32),
            **{name: (shape[: len(axes)], kind) for name, (axes, kind) in more.items()},
        }

    reset = {"reset": ("BL", bool)}
    delta = {"beta": ("BLH", jnp.float32)}
    return {
        "bfloat16": size(64),
        "bfloat16, delta rule": size(64, **delta),
        "bfloat16, reset": size(64, **reset),
        "bfloat16, 128 keys": size(128),
        "bfloat16, 128 keys, reset": size(128, heads=32, **reset),
        "bfloat16, 128 keys, delta rule": size(128, heads=32, **delta),
        "bfloat16, 128 keys, delta rule, reset": size(128, heads=32, **delta, **reset),
        "float32, reset": size(64, jnp.float32, **reset),
        "float32, delta rule, reset": size(64, jnp.float32, **delta, **reset),
        "float32, many heads": size(64, jnp.float32, 32, **reset),
        "float32, many heads, delta rule": size(64, jnp.float32, 32, **delta),
        "float32, many heads, delta rule, reset": size(
            64, jnp.float32, 32, **delta, **reset
        ),
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
        node_cases("vandermonde", lambda length: {"length": length}),
        in_both(filter_sizes),
        {"kernels.vandermonde.triton": {"LOW": 4, "HIGH": 2, "TILES": 2}},
    ),
    "vandermonde_transpose": Kernel(
        vandermonde_transpose,
        node_cases("vandermonde_transpose", lambda length: {}),
        in_both(moment_sizes),
        {"kernels.vandermonde.triton": {"LOW": 4, "HIGH": 2, "TILES": 2}},
    ),
    "chunked_scan": Kernel(
        chunked_scan,
        attention_cases,
        attention_sizes(),
        {"kernels.chunked_scan.triton_decay": {"CHUNK": 32, "PROGRAMS": 1}},
    ),
    "chunked_scan, two walks": Kernel(
        chunked_scan,
        attention_cases,
        {},  # many of those above have too few programs for one walk
        {"kernels.chunked_scan.triton_decay": {"CHUNK": 32, "FEW": 0}},
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
            if case.dtype == "bfloat16":
                for name in real_arrays(case.inputs)[:2]:
                    check_one_narrow(
                        kernel.call, case.inputs, name, "triton", **case.static
                    )
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
SLOW |= {"chunked_scan", "chunked_scan, two walks", "linear_scan"}


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


def test_selective_scan_reads_each_array_in_its_own_dtype():
    """Nothing is widened in memory before a kernel, nor its sequences after it."""
    shapes = KERNELS["selective_scan"].sizes["bfloat16"]
    sequences = {shapes[name][0] for name in ("u", "B")}
    narrow = set()
    for call in calls(selective_scan, shapes):
        arrays = [x for x in (*call.arguments, *call.outputs) if not isinstance(x, int)]
        widths = {x.dtype.itemsize for x in arrays if x.shape in sequences}
        assert widths <= {2}, call.kernel.__name__
        narrow |= {call.kernel.__name__} if widths else set()
    assert {"_forward", "_backward"} <= narrow


def calls(call, shapes):
    """The different calls of Triton kernels that both passes make."""
    static = {name: x for name, x in shapes.items() if isinstance(x, int)}
    arrays = {
        name: jax.ShapeDtypeStruct(*shape)
        for name, shape in shapes.items()
        if name not in static and shape is not None
    }
    fixed = {name: x for name, x in arrays.items() if x.dtype == bool}
    moving = {name: x for name, x in arrays.items() if name not in fixed}

    def both(moving, fixed):
        def forward(moving):
            return call(**moving, **fixed, **static, backend="triton")

        values, pull = jax.vjp(forward, moving)
        return pull(jax.tree.map(jnp.ones_like, values))

    different = machine_code.calls(both, (moving, fixed))
    names = {one.kernel.__name__ for one in different}
    assert len(names) > 1, f"one kernel for both passes: {names}"
    return different


if __name__ == "__main__":
    found = interpret(sys.argv[1], "full" in sys.argv[2:])
    print("\n".join(found))
    sys.exit(bool(found))
