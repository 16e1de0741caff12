"""Every operation under the transformations of JAX: values and gradients stay.

`jax.shard_map` with its default check, over all devices there are: one in a test, two
in a process of its own (`test_two_devices`).
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import compat, dispatch, dplr_filter
from kernels.cases import OPERATIONS, Case, evaluate, parted, rounded
from kernels.tolerance import assert_close

# What is split over the batch, or over sets of sums; all else is the same everywhere.
SPLIT = {
    "linear_scan": {"a", "x"},
    "contracted_scan": {"u", "dt"},
    "selective_scan": {"u", "dt", "B", "C"},
    "chunked_scan": {"q", "k", "v", "log_decay", "beta"},
    "fft_conv": {"u", "pre_gate", "post_gate"},
    "butterfly_conv": {"u"},
    "short_conv": {"u"},
    "vandermonde": {"c"},
    "vandermonde_transpose": {"u"},
    "cauchy": {"v"},
}
WITH_A_BATCH = {"initial_state", "reset"}
REPLICATED = {
    ("linear_scan", "constant a"): {"a"},
    ("chunked_scan", "constant decay"): {"log_decay"},
    ("cauchy", "one sum"): {"v"},
}


def mesh():
    return jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )


def split_arguments(op, variant):
    return (SPLIT[op] | WITH_A_BATCH) - REPLICATED.get((op, variant), set())


def functional(op, static):
    """The sum of all results under weights that depend on the place in the batch."""

    def call(moving, fixed):
        values = op(**moving, **fixed, **static)
        total = 0
        for leaf in jax.tree.leaves(values):
            for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
                weights = jnp.cos(jnp.arange(part[0].size)).reshape(part.shape[1:])
                total = total + jnp.sum(weights * part)
        return total, values

    return jax.value_and_grad(call, has_aux=True)


def sharded(op, static, inputs, split):
    """A function of what moves and what does not: values, and the gradients of a sum
    over all devices, from inside of `jax.shard_map`."""
    specs = {
        name: jax.tree.map(lambda _, n=name: P("data") if n in split else P(), x)
        for name, x in inputs.items()
    }
    taken = tuple({k: specs[k] for k in part} for part in parted(inputs))
    run = functional(op, static)

    def device(moving, fixed):
        (_, values), gradients = run(moving, fixed)
        return values, gradients

    given = P("data") if split & inputs.keys() else P()
    return jax.jit(
        jax.shard_map(
            device, mesh=mesh(), in_specs=taken, out_specs=(given, taken[0])
        )
    )


def plain(op, static, inputs):
    (_, values), gradients = jax.jit(functional(op, static))(*parted(inputs))
    return values, gradients


def forms():
    for op, operation in OPERATIONS.items():
        for variant in operation.variants:
            for backend, module in operation.backends.items():
                if not isinstance(module, dispatch.OnPlatform):
                    yield op, variant, backend


def prepared(op, variant, backend, options, length):
    operation = OPERATIONS[op]
    case = Case(variant, length, **dict.fromkeys(options, True))
    inputs = rounded(operation.inputs(case), "float32")
    static = operation.static(case) | {"backend": backend}
    return operation.call, static, inputs


@pytest.mark.parametrize(("op", "variant", "backend"), list(forms()))
def test_types_inside_of_shard_map(op, variant, backend):
    """What varies over the devices is told when a call is traced: an operation that
    makes an array inside, or a backward rule that forgets to add up, raises there."""
    for options, length in (({"state", "reset"}, 70), ((), 70), ((), 1)):
        call, static, inputs = prepared(op, variant, backend, options, length)
        run = sharded(call, static, inputs, split_arguments(op, variant))
        run.trace(*parted(inputs))


def compared(op, variant, backend, options, length):
    call, static, inputs = prepared(op, variant, backend, options, length)
    run = sharded(call, static, inputs, split_arguments(op, variant))
    found = run(*parted(inputs))
    values, gradients = plain(call, static, inputs)
    assert_close(found[0], values)
    assert_close(found[1], gradients, "gradient")
