"""How much a step computes, counted where JAX has written it down.

A compiler's own count takes the body of a loop once, however often it runs, and a stack
of blocks is a loop.
"""

import math

import jax
import numpy as np


def flops(jaxpr) -> float:
    """Floating-point operations of matrix products, convolutions and Fourier transforms
    in a step as it is written: loops as often as they run, every device's part, what a
    rematerialised block computes again. Not what is done number by number, and not what
    a Triton kernel does.

    Args:
        jaxpr: `jax.stages.Traced.jaxpr`.
    """
    return sum(_one(equation) for equation in jaxpr.eqns)


def _one(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name in COUNTED:
        return COUNTED[name](equation)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        times = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
    elif name == "shard_map":
        mesh, manual = params["mesh"], params.get("manual_axes", ())
        times = math.prod(mesh.shape[axis] for axis in manual)
    elif name == "cond":
        return max(flops(_inner(branch)) for branch in params["branches"])
    inside = [x for x in jax.tree.leaves(params, is_leaf=_has_equations)]
    return times * sum(flops(_inner(x)) for x in inside if _has_equations(x))


def _has_equations(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _inner(x):
    return x if hasattr(x, "eqns") else _inner(x.jaxpr)


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, _ = (x.aval for x in equation.invars)
    inner = math.prod(left.shape[axis] for axis in contracted)
    return _each(equation) * math.prod(equation.outvars[0].aval.shape) * inner


def _convolution(equation) -> float:
    filters = equation.invars[1].aval
    outputs = equation.params["dimension_numbers"].rhs_spec[0]
    inner = math.prod(filters.shape) / filters.shape[outputs]
    return _each(equation) * math.prod(equation.outvars[0].aval.shape) * inner


def _each(equation) -> int:
    """Of one product and its sum; of complex numbers four of each."""
    dtype = equation.outvars[0].aval.dtype
    return 8 if np.issubdtype(dtype, np.complexfloating) else 2


def _fourier(equation) -> float:
    """5 N log2 N, half of that where one side is real."""
    sizes = equation.params["fft_lengths"]
    points = math.prod(sizes)
    shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
    count = max(math.prod(shape[: -len(sizes)]) for shape in shapes)
    real = len({x.aval.dtype for x in (*equation.invars, *equation.outvars)}) > 1
    return count * 5 * points * math.log2(max(points, 2)) / (1 + real)


COUNTED = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "fft": _fourier,
}
