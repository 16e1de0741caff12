"""What the tests of the kernels share; the comparison is that of `kernels.check`."""

import itertools

import jax
import numpy as np
import pytest

from kernels.check.cases import DTYPES, OPERATIONS, Case
from kernels.check.comparison import check, expected, results, rounded, widened
from kernels.tolerance import assert_close

__all__ = [
    "DTYPES",
    "LENGTHS",
    "OPTIONS",
    "check",
    "check_one_narrow",
    "inputs_of",
    "product",
    "real_arrays",
    "results",
    "rounded",
    "temporary_bytes",
    "widened",
]

OPTIONS = [
    frozenset({"state", "reset", "reverse"}),
    frozenset(),
    frozenset({"state"}),
    frozenset({"reset", "reverse"}),
    frozenset({"state", "reset"}),
]
LENGTHS = [7, 1, 64, 1000]


def inputs_of(name, variant, length, options=(), **sizes):
    """Those of an operation in OPERATIONS, with a state and resets if the options
    say so; `sizes` instead of its own."""
    case = Case(variant, length, "state" in options, "reset" in options)
    return OPERATIONS[name].inputs(case, **sizes)


def real_arrays(inputs):
    """The names of those among the inputs of an operation."""
    return [name for name, x in inputs.items() if np.asarray(x).dtype.kind == "f"]


def check_one_narrow(op, inputs, narrow, backend, **static):
    """As `check`, with the array `narrow` in bfloat16 and all others in float32."""
    inputs = {
        name: rounded(x, "bfloat16" if name == narrow else "float32")
        for name, x in inputs.items()
    }
    values, gradients = expected(op, inputs, **static)
    actual, actual_gradients = results(op, inputs, backend=backend, **static)
    assert_close(actual, values, "value", "bfloat16")
    assert_close(actual_gradients, gradients, "gradient", "bfloat16")


def option_id(options):
    return "+".join(sorted(options)) or "plain"


def product(**axes):
    """Parametrises a test by every combination of the axes' values.

    All are marked slow but at most three, the first values of all axes together in one
    of them, the second in another.
    """
    count = min(3, max(len(values) for values in axes.values()))
    quick = [tuple(v[k % len(v)] for v in axes.values()) for k in range(count)]
    cases = []
    for case in itertools.product(*axes.values()):
        words = [option_id(v) if isinstance(v, frozenset) else v for v in case]
        words = [
            "x".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in words
        ]
        marks = [] if case in quick else [pytest.mark.slow]
        cases.append(pytest.param(*case, id="-".join(words), marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)


def temporary_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes
