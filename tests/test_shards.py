"""`kernels.shards`: on many devices an operation is what it is on one.

Values and every gradient on eight emulated devices (in a process of its own, see
`test_eight_devices`), two parts of the channels and four of the rows.
"""

import os
import subprocess
import sys

import jax
import pytest
import test_transformations
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import dispatch, shards
from kernels.check.cases import OPERATIONS, Case
from kernels.check.comparison import rounded
from kernels.tolerance import assert_close

SIZES = {"B": 4, "D": 20, "H": 4, "G": 4}
DEVICES = 8
AXES = ("data", "fsdp", "tensor")


def mesh(*sizes):
    devices = jax.devices()
    if not sizes:
        sizes = (2, 2, 2) if len(devices) == DEVICES else (len(devices), 1, 1)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def over(some):
    return shards.over(some, rows=("data", "fsdp"), channels=("tensor",))


def inputs_of(op, variant, length=20, **options):
    operation = OPERATIONS[op]
    case = Case(variant, length, **options)
    sizes = {k: n for k, n in SIZES.items() if k in operation.small}
    static = operation.static(case)
    return operation.call, static, rounded(operation.inputs(case, **sizes), "float32")


def results(op, static, inputs, some=None):
    """Values and gradients, split over a mesh or not."""
    run = jax.jit(test_transformations.functional(op, static))
    moving, fixed = test_transformations.parted(inputs)
    if some is None:
        (_, values), gradients = run(moving, fixed)
        return values, gradients
    spread = NamedSharding(some, PartitionSpec())
    moving, fixed = jax.device_put((moving, fixed), spread)
    with over(some):
        (_, values), gradients = run(moving, fixed)
    return jax.device_get((values, gradients))


EVERY = [(op, v) for op, o in OPERATIONS.items() for v in o.variants]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"state": True, "reset": True}], ids=str)
@pytest.mark.parametrize(("op", "variant"), EVERY)
def test_is_what_it_is_on_one_device(op, variant, options):
    call, static, inputs = inputs_of(op, variant, **options)
    values, gradients = results(call, static, inputs)
    found, found_gradients = results(call, static, inputs, mesh())
    assert_close(found, values)
    assert_close(found_gradients, gradients, "gradient")
