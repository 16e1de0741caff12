"""How a backend is compared with the definition: values and every gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tolerance import assert_close

OPTIONS = [
    frozenset({"state", "reset", "reverse"}),
    frozenset(),
    frozenset({"state"}),
    frozenset({"reset", "reverse"}),
    frozenset({"state", "reset"}),
]
LENGTHS = [7, 1, 64, 1000]
DTYPES = ["float32", "bfloat16", "float64"]


def option_id(options):
    return "+".join(sorted(options)) or "plain"


def product(**axes):
    """Parametrises a test by every combination of the axes' values.

    The first value of each axis makes the central case. What differs from it in more
    than one axis is marked slow: every value is tried quickly, every pair in full.
    """
    centre = [values[0] for values in axes.values()]
    cases = []
    for case in itertools.product(*axes.values()):
        away = sum(
            value is not middle for value, middle in zip(case, centre, strict=True)
        )
        words = [option_id(v) if isinstance(v, frozenset) else v for v in case]
        words = [
            "x".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in words
        ]
        marks = [pytest.mark.slow] if away > 1 else []
        cases.append(pytest.param(*case, id="-".join(words), marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)


def rounded(inputs, dtype):
    """Float arrays in `dtype` (complex ones in its complex counterpart)."""

    def cast(x):
        if np.iscomplexobj(x):
            wide = dtype == "float64"
            return x.astype(np.complex128 if wide else np.complex64)
        if x.dtype.kind == "f":
            return x.astype(jnp.dtype(dtype))
        return x

    return {k: None if x is None else cast(np.asarray(x)) for k, x in inputs.items()}


def widened(inputs):
    return rounded(
        {
            k: x
            if x is None or np.iscomplexobj(x) or x.dtype == bool
            else x.astype(np.float64)
            for k, x in inputs.items()
        },
        "float64",
    )


def results(op, inputs, **static):
    """All outputs of `op(**inputs, **static)`, and the gradient of a fixed random
    functional of them by every floating input."""
    fixed = {k: x for k, x in inputs.items() if x is None or x.dtype == bool}
    moving = {k: x for k, x in inputs.items() if k not in fixed}
    run = _compiled(op, tuple(sorted(static.items())))
    return jax.tree.map(np.asarray, run(moving, fixed))


@functools.lru_cache(maxsize=64)
def _compiled(op, static):
    """One function for all dtypes, so that the reference is compiled once per shape."""

    def functional(moving, fixed):
        values = op(**moving, **fixed, **dict(static))
        total = 0
        for i, leaf in enumerate(jax.tree.leaves(values)):
            rng = np.random.default_rng(i)
            for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
                weight = rng.standard_normal(leaf.shape).astype(part.dtype)
                wide = jnp.promote_types(part.dtype, jnp.float32)
                total = total + jnp.sum(weight.astype(wide) * part.astype(wide))
        return total, values

    @jax.jit
    def run(moving, fixed):
        gradient = jax.value_and_grad(functional, has_aux=True)
        (_, values), gradients = gradient(moving, fixed)
        return values, gradients

    return run


def check(op, inputs, dtype, backend, **static):
    """`backend` in `dtype` against the reference in float64 on the same numbers."""
    inputs = rounded(inputs, dtype)
    with jax.enable_x64(True):
        values, gradients = results(op, widened(inputs), backend="reference", **static)
    with jax.enable_x64(dtype == "float64"):
        found, found_gradients = results(op, inputs, backend=backend, **static)
    assert_close(found, values, "value", dtype)
    assert_close(found_gradients, gradients, "gradient", dtype)
    return found


def temporary_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes
