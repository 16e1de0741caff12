"""No program of an operation holds a table as long as its input."""

import jax
import jax.numpy as jnp
import pytest
from constants import largest_constant

from kernels import dispatch
from kernels.check.cases import OPERATIONS, Case
from kernels.check.comparison import precision

LONG = 2**20
SIZE = dict(B=1, R=1, D=64, H=64, N=2, G=1, K=2, V=1, W=4)
# Bytes of the largest constant that must grow with the length, each with its reason.
GROWING = {
    # s and mu at L / 2 + 1 points, which float64 makes: near theta = pi, where
    # the filter of a system is decided, float32 would lose the digits of s
    ("cauchy", "xla"): 4 * (LONG // 2 + 1),
}
# Of each other operation the first variant.
QUICK = {
    "fft_conv": ("short filter", "monarch"),
    "butterfly_conv": ("one-sided", "monarch"),
}


def forms():
    for op, operation in OPERATIONS.items():
        for variant in operation.variants:
            for backend, module in operation.backends.items():
                compiled = isinstance(module, dispatch.OnPlatform)
                if backend != "reference" and not compiled and "strong" not in variant:
                    quick = QUICK.get(op, (operation.variants[0], "xla"))
                    marks = [] if (variant, backend) == quick else [pytest.mark.slow]
                    yield pytest.param(op, variant, backend, marks=marks)


def abstract_inputs(operation, variant):
    size = {name: SIZE[name] for name in operation.small}
    if "conv" in operation.name and "K" in size:
        size["K"] = LONG
    shapes = operation.shapes(Case(variant, LONG, True, True), **size)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, precision(x.dtype, "float32"))

    return jax.tree.map(abstract, shapes)


@pytest.mark.parametrize(("op", "variant", "backend"), list(forms()))
def test_no_program_of_an_operation_holds_a_table(op, variant, backend):
    """At most 1 MB of constants at 2^20 tokens of 64 features, forwards and back."""
    operation = OPERATIONS[op]
    static = operation.static(Case(variant, LONG)) | {"backend": backend}
    if "return_transition" in static:
        static["return_transition"] = True
    inputs = abstract_inputs(operation, variant)
    optional = {"initial_state", "reset"}
    plain = {name: x for name, x in inputs.items() if name not in optional}

    def total(moving, fixed):
        leaves = jax.tree.leaves(operation.call(**moving, **fixed, **static))
        return sum(jnp.sum(jnp.abs(x)) for x in leaves)

    for arguments in [plain] if inputs.keys() == plain.keys() else [inputs, plain]:
        fixed = {name: x for name, x in arguments.items() if name == "reset"}
        moving = {name: x for name, x in arguments.items() if name != "reset"}
        for function in (total, jax.grad(total)):
            size = largest_constant(jax.jit(function).lower(moving, fixed))
            assert size <= GROWING.get((op, backend), 2**20) + 100
