"""A backend beside the definition: outputs, and the gradient by every input.

Both are computed from the same numbers, the definition (`reference.py`) in float64 on
the CPU, and compared within the limits of `kernels/tolerance.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.tolerance import assert_close

OUTPUTS = ("output", "final_state", "transition")

# For what runs once per shape: compiling it well would cost more than it saves.
QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # others do not know it
    QUICK_TO_COMPILE["xla_cpu_use_fusion_emitters"] = False


def precision(of, dtype):
    """`dtype` for floats, its complex counterpart for complex numbers, for all else
    what it is `of`."""
    if jnp.issubdtype(of, jnp.complexfloating):
        return np.dtype("complex128" if dtype == "float64" else "complex64")
    return jnp.dtype(dtype) if jnp.issubdtype(of, jnp.floating) else of


def rounded(inputs, dtype):
    """Arrays in the `precision` of `dtype`."""

    def cast(x):
        x = np.asarray(x)
        return x.astype(precision(x.dtype, dtype))

    return jax.tree.map(cast, inputs)


def widened(inputs):
    """The same numbers in float64 and complex128."""
    return rounded(inputs, "float64")


def results(op, inputs, **static):
    """All outputs of `op(**inputs, **static)`, and the gradient of a fixed random
    functional of them by every floating input."""
    return compiled_results(op, inputs, static)


def expected(op, inputs, **static):
    """`results` of the definition in float64, on the CPU: not every accelerator has
    float64."""
    static = {**static, "backend": "reference"}
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        return compiled_results(op, widened(inputs), static, QUICK_TO_COMPILE)


def compiled_results(op, inputs, static, compiler_options=None):
    """`results`, compiled with these options of XLA."""
    moving, fixed = parted(inputs)
    items = (
        tuple(sorted((options or {}).items())) for options in (static, compiler_options)
    )
    return jax.tree.map(np.asarray, _compiled(op, *items)(moving, fixed))


def parted(inputs):
    """What has a gradient, and what has none: flags, and None."""
    fixed = {
        name: x
        for name, x in inputs.items()
        if all(leaf.dtype == bool for leaf in jax.tree.leaves(x))
    }
    return {name: x for name, x in inputs.items() if name not in fixed}, fixed


@functools.lru_cache(maxsize=64)
def _compiled(op, static, compiler_options):
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

    def run(moving, fixed):
        gradient = jax.value_and_grad(functional, has_aux=True)
        (_, values), gradients = gradient(moving, fixed)
        return values, gradients

    return jax.jit(run, compiler_options=dict(compiler_options) or None)


def check(op, inputs, dtype, backend, **static):
    """`backend` in `dtype` against the definition in float64 on the same numbers.

    Returns:
        the outputs of the backend.

    Raises:
        AssertionError: an output or a gradient is off by more than its limit.
    """
    inputs = rounded(inputs, dtype)
    values, gradients = expected(op, inputs, **static)
    with jax.enable_x64(dtype == "float64"):
        actual, actual_gradients = results(op, inputs, backend=backend, **static)
    assert_close(actual, values, "value", dtype)
    assert_close(actual_gradients, gradients, "gradient", dtype)
    return actual


def named_outputs(values) -> dict:
    """The outputs of an operation by name."""
    outputs = values if isinstance(values, tuple) else (values,)
    return dict(zip(OUTPUTS, outputs, strict=False))


def named_arrays(tree: dict) -> dict:
    """Every array with a name such as "u" or "factors[0]"."""
    return {
        name + jax.tree_util.keystr(path): array
        for name, x in tree.items()
        for path, array in jax.tree_util.tree_leaves_with_path(x)
    }
