"""Every operation under the transformations of JAX: values and gradients stay.

`jax.vmap`, `jax.checkpoint`, a `jax.lax.scan` over calls with a donated state, and
`jax.shard_map` with its default check, over all devices there are: one in a test, two
in a process of its own (`test_two_devices`).
"""

import contextlib
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import compat, dispatch
from kernels.check.cases import OPERATIONS, Case
from kernels.check.comparison import parted, rounded
from kernels.tolerance import assert_close
from ssm import conv_ssm, dplr, filters, recurrence
from ssm import sequence as seq

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
                row = part.shape[1:]
                weights = jnp.cos(jnp.arange(math.prod(row), dtype=part.dtype))
                weights = weights.reshape(row)
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
        jax.shard_map(device, mesh=mesh(), in_specs=taken, out_specs=(given, taken[0]))
    )


def plain(op, static, inputs):
    (_, values), gradients = jax.jit(functional(op, static))(*parted(inputs))
    return values, gradients


def forms(kernels=False):
    """Of every variant of every operation: those in XLA, or the kernels."""
    for op, operation in OPERATIONS.items():
        for variant in operation.variants:
            for backend, module in operation.backends.items():
                if isinstance(module, dispatch.OnPlatform) == kernels:
                    yield op, variant, backend


# The functions of `ssm` that make arrays or loops: (call, inputs, what is split).


def bank_call(mode):
    def call(log_a, b, c, u, **rest):
        return mode(recurrence.Diagonal(log_a, b, c), u, **rest)

    return call


def mixed_call(log_a, B, C, u, state=None, elapsed=None, reset=None, reverse=False):
    def rule(elapsed):
        z = log_a if elapsed is None else elapsed * log_a
        return z, jnp.exp(z)

    options = dict(reverse=reverse, chunk=4)
    return recurrence.mixed(rule, B, C, u, state, elapsed, reset, **options)


def varying_call(log_a, B, c, u, state=None, elapsed=None, reset=None):
    def rule(elapsed):
        z = elapsed * log_a
        return z, jnp.exp(z)

    elapsed = jnp.ones(u.shape[:2], u.dtype) if elapsed is None else elapsed
    return recurrence.varying(rule, B, c, u, state, elapsed, reset, chunk=4)


def convolved_call(log_a, B, C, u, state=None, elapsed=None, reset=None):
    def rule(elapsed):
        z = log_a if elapsed is None else elapsed * log_a
        return z, jnp.exp(z)

    return conv_ssm.convolved(rule, B, C, u, state, elapsed, reset, chunk=4)


def dplr_call(lam, P, B, dt, C, u, state=None, elapsed=None, reset=None):
    system = dplr.DPLR(lam, P, B, dt)
    return dplr.varying(system, C, u, state, elapsed, reset, chunk=4)


def dplr_filter_call(lam, P, B, dt, C, u, state=None):
    """What S4 makes of a system: filter, what a state says, and the final state."""
    system = dplr.DPLR(lam, P, B, dt)
    K = filters.dplr(system, dplr.truncated(system, C[None], 7), 7)
    y = u[..., 0, None, None] * K[0]
    if state is not None:
        y = y[:, 0] + dplr.response(system, C, state, 7).swapaxes(1, 2)
    return y, dplr.final_state(system, u, state)


def masked_call(u, before, mask, reset, elapsed):
    """Everything that moves tokens."""
    x, sequence, restore = seq.compact(u, seq.Sequence(mask, reset, elapsed))
    started, after = seq.begun(before[:, 0, 0] > 0, sequence, x.shape[:2])
    elapsed = seq.elapsed(sequence)[..., None]
    return (
        restore(elapsed * x * started[..., None]),
        seq.window(before, x, sequence),
        jnp.where(after[:, None], seq.align_right(x, sequence.mask)[:, 0], 0),
    )


def ssm_cases(rng, batch, length):
    H, n, size = 3, 2, (2, 3)

    def real(*shape):
        return rng.standard_normal(shape)

    def complex_(*shape):
        return real(*shape) + 1j * real(*shape)

    def rates(*shape):
        return -rng.uniform(0.1, 0.5, shape) + 1j * rng.uniform(-2, 2, shape)

    sequences = {
        "u": real(batch, length, H),
        "elapsed": rng.uniform(0, 2, (batch, length)),
        "reset": rng.uniform(size=(batch, length)) < 0.3,
    }
    bank = {"log_a": rates(H, n), "b": complex_(H, n), "c": complex_(H, n)}
    banked = bank | sequences | {"state": complex_(batch, H, n)}
    mixed = {"log_a": rates(n), "B": complex_(n, H), "C": complex_(H, n)}
    mixed |= sequences | {"state": complex_(batch, n)}
    frames = {
        "log_a": rates(n),
        "B": complex_(3, 3, H, n),
        "C": complex_(3, 3, n, H),
        "state": complex_(batch, *size, n),
        "u": real(batch, length, *size, H),
    }
    low_rank = {
        "lam": rates(H, n),
        "P": complex_(1, H, n),
        "B": complex_(H, n),
        "dt": rng.uniform(0.1, 0.2, (H, 1)),
        "C": complex_(H, n),
        "state": complex_(batch, H, n),
    }
    step = {k: x[:, 0] if k in sequences else x for k, x in banked.items()}
    varying_ = {"B" if k == "b" else k: x for k, x in banked.items()}
    times = {k: x for k, x in sequences.items() if k != "u"}
    yield "step", bank_call(recurrence.step), step
    yield "scan", bank_call(recurrence.scan), banked
    yield "chunked", bank_call(recurrence.chunked), banked
    convolution = {k: banked[k] for k in ("log_a", "b", "c", "u")}
    existing = rng.integers(1, length + 1, (batch, 1))
    convolution |= {"skip": real(H), "mask": np.arange(length) < existing}
    yield "convolution", bank_call(recurrence.convolution), convolution
    yield "varying", varying_call, varying_
    yield "mixed", mixed_call, mixed
    yield "mixed, reverse", functools.partial(mixed_call, reverse=True), mixed
    yield "conv_ssm", convolved_call, frames | times
    yield "dplr", dplr_call, low_rank | sequences
    yield "dplr filter", dplr_filter_call, low_rank | {"u": sequences["u"]}
    masked = {
        "u": sequences["u"],
        "before": real(batch, 2, H),
        "mask": rng.uniform(size=(batch, length)) < 0.5,
        **times,
    }
    yield "tokens that do not exist", masked_call, masked


PER_ROW = {"u", "state", "elapsed", "reset", "mask", "before"}
CASES = [name for name, *_ in ssm_cases(np.random.default_rng(0), 2, 1)]
OF_ALL_IN_SSM = pytest.mark.parametrize(
    ("case", "left_out"),
    [
        pytest.param(case, left_out, marks=[pytest.mark.slow] if left_out else [])
        for left_out in [(), ("state", "elapsed", "reset"), ("elapsed",)]
        for case in CASES
    ],
)


@OF_ALL_IN_SSM
def test_types_inside_of_shard_map_in_ssm(case, left_out):
    for length in (11, 1) if left_out else (11,):
        call, inputs = ssm_case(case, length, left_out)
        sharded(call, {}, inputs, PER_ROW).trace(*parted(inputs))


def ssm_case(case, length, left_out=(), batch=2):
    cases = ssm_cases(np.random.default_rng(length), batch, length)
    call, inputs = next((call, x) for name, call, x in cases if name == case)
    needed = {"step": {"state"}, "tokens that do not exist": {"reset", "elapsed"}}
    left_out = set(left_out) - needed.get(case, set())
    inputs = {k: x for k, x in inputs.items() if k not in left_out}
    return call, rounded(inputs, "float32")


def prepared(op, variant, backend, options, length):
    operation = OPERATIONS[op]
    case = Case(variant, length, **dict.fromkeys(options, True))
    inputs = rounded(operation.inputs(case), "float32")
    static = operation.static(case) | {"backend": backend}
    return operation.call, static, inputs


ONE_OF_EACH = [
    (op, o.variants[0], "xla" if "xla" in o.backends else next(iter(o.backends)))
    for op, o in OPERATIONS.items()
]
EVERY_FORM = [
    pytest.param(*form, marks=[] if form in ONE_OF_EACH else [pytest.mark.slow])
    for form in forms()
]
EVERY_OPTION = pytest.mark.parametrize(
    "options",
    [{"state", "reset"}, pytest.param(set(), marks=pytest.mark.slow)],
    ids=["all", "none"],
)
OF_ALL = pytest.mark.parametrize(("op", "variant", "backend"), EVERY_FORM)


@EVERY_OPTION
@OF_ALL
def test_types_inside_of_shard_map(op, variant, backend, options):
    """What varies over the devices is told when a call is traced: an operation that
    makes an array inside, or a backward rule that forgets to add up, raises there."""
    for length in (70,) if options else (70, 1):
        call, static, inputs = prepared(op, variant, backend, options, length)
        run = sharded(call, static, inputs, split_arguments(op, variant))
        run.trace(*parted(inputs))


EVERY_KERNEL = [
    pytest.param(op, variant, backend, marks=[] if first else [pytest.mark.slow])
    for op, variant, backend in forms(kernels=True)
    for first in [variant == OPERATIONS[op].variants[0]]
]


@EVERY_OPTION
@pytest.mark.parametrize(("op", "variant", "backend"), EVERY_KERNEL)
def test_types_of_kernels_inside_of_shard_map(op, variant, backend, options):
    """As on their own devices, where neither Triton nor Pallas says what varies."""
    call, static, inputs = prepared(op, variant, backend, options, 70)
    if reason := untaken(call, static, inputs):
        pytest.skip(reason)
    run = sharded(call, static, inputs, split_arguments(op, variant))
    with on_its_device(backend):
        run.trace(*parted(inputs))


def untaken(call, static, inputs):
    """Why the backend in `static` does not take these."""
    with on_its_device(static["backend"]):
        try:
            jax.eval_shape(lambda inputs: call(**inputs, **static), inputs)
        except ValueError as refusal:
            return str(refusal)
    return None


@contextlib.contextmanager
def on_its_device(backend):
    if backend == "pallas_tpu":
        with compat.lowering_for("tpu"):
            yield
    else:
        with compat.recorded():
            yield


def in_shard_map(op, variant, backend):
    call, static, inputs = prepared(op, variant, backend, {"state", "reset"}, 5)
    found = sharded(call, static, inputs, split_arguments(op, variant))
    values, gradients = plain(call, static, inputs)
    found_values, found_gradients = found(*parted(inputs))
    assert_close(found_values, values)
    assert_close(found_gradients, gradients, "gradient")


def in_shard_map_in_ssm(case):
    call, inputs = ssm_case(case, 11)
    values, gradients = plain(call, {}, inputs)
    found_values, found_gradients = sharded(call, {}, inputs, PER_ROW)(*parted(inputs))
    assert_close(found_values, values)
    assert_close(found_gradients, gradients, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "variant", "backend"), ONE_OF_EACH)
def test_values_inside_of_shard_map(op, variant, backend):
    in_shard_map(op, variant, backend)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_inside_of_shard_map_in_ssm(case):
    in_shard_map_in_ssm(case)


@pytest.mark.slow
def test_two_devices():
    """The same on two: gradients of what is replicated are added up."""
    flags = os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, __file__, "-k", "test_values_inside_of_shard_map"],
        env=os.environ
        | {"XLA_FLAGS": flags + " --xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    if jax.device_count() == 1:
        assert f"{len(ONE_OF_EACH) + len(CASES)} passed" in done.stdout


@pytest.mark.parametrize(
    "options",
    [{"state"}, pytest.param({"state", "reset"}, marks=pytest.mark.slow)],
    ids=["state", "state+reset"],
)
@pytest.mark.parametrize(("op", "variant", "backend"), ONE_OF_EACH)
def test_vmap_checkpoint_and_scan(op, variant, backend, options):
    """Two calls at once whose backward pass makes everything again, and one after the
    other in a loop."""
    call, static, inputs = prepared(op, variant, backend, options, 5)
    static.pop("return_transition", None)
    flipped = jax.tree.map(lambda x: np.flip(x, 0).copy(), inputs)
    # systems are to stay stable
    flipped |= {k: x for k, x in inputs.items() if k in ("a", "log_decay", "dt")}
    run = jax.jit(functional(call, static))
    alone = [run(*parted(x)) for x in (inputs, flipped)]
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    both = jax.tree.map(lambda *x: np.stack(x), inputs, flipped)
    saving = functional(jax.checkpoint(functools.partial(call, **static)), {})
    (_, values), gradients = jax.jit(jax.vmap(saving))(*parted(both))
    assert_close(values, expected[0][1])
    assert_close(gradients, expected[1], "gradient")

    if "initial_state" not in inputs:
        return

    def step(state, given):
        output, state, *_ = call(**given | {"initial_state": state}, **static)
        return state, output

    @functools.partial(jax.jit, donate_argnums=0)
    def calls(state, both):
        return jax.lax.scan(step, state, both)

    state, outputs = jnp.array(inputs["initial_state"]), []
    left = {name: x for name, x in both.items() if name != "initial_state"}
    for given in (inputs, flipped):
        (_, (output, state, *_)), _ = run(*parted(given | {"initial_state": state}))
        outputs.append(output)
    final, found = calls(jnp.array(inputs["initial_state"]), left)
    assert_close(final, state)
    assert_close(found, np.stack(outputs))


# A batch of nothing, float32 where float64 is allowed.


@EVERY_OPTION
@OF_ALL
def test_empty_batch(op, variant, backend, options):
    split = split_arguments(op, variant)
    if op in ("vandermonde", "cauchy"):
        pytest.skip("has no batch")
    call, static, inputs = prepared(op, variant, backend, options, 9)
    whole = jax.eval_shape(functional(call, static), *parted(inputs))
    empty = {k: x[:0] if k in split else x for k, x in inputs.items()}
    found = jax.eval_shape(functional(call, static), *parted(empty))
    (_, values), gradients = found
    for leaf, full in zip(
        jax.tree.leaves(values), jax.tree.leaves(whole[0][1]), strict=True
    ):
        assert leaf.shape == (0, *full.shape[1:])
        assert leaf.dtype == full.dtype
    for name, gradient in gradients.items():
        shapes = [jax.tree.map(np.shape, x) for x in (gradient, empty[name])]
        assert shapes[0] == shapes[1], name


def test_gradients_of_an_empty_batch_are_zeros():
    call, static, inputs = prepared("fft_conv", "gated", "xla", {"state"}, 9)
    split = split_arguments("fft_conv", "gated")
    empty = {k: x[:0] if k in split else x for k, x in inputs.items()}
    values, gradients = plain(call, static, empty)
    assert values[0].size == values[1].size == 0
    assert not np.any(gradients["k"]) and gradients["k"].shape == inputs["k"].shape


@OF_ALL_IN_SSM
def test_empty_batch_in_ssm(case, left_out):
    call, inputs = ssm_case(case, 9, left_out)
    empty = {k: x[:0] if k in PER_ROW else x for k, x in inputs.items()}
    found = jax.eval_shape(functional(call, {}), *parted(empty))
    for leaf in jax.tree.leaves(found[0][1]):
        assert leaf.shape[0] == 0


@EVERY_OPTION
@OF_ALL
def test_float32_stays_where_float64_is_allowed(op, variant, backend, options):
    call, static, inputs = prepared(op, variant, backend, options, 9)
    with jax.enable_x64(True):
        found = jax.eval_shape(functional(call, static), *parted(inputs))
    names = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert names <= {"float32", "complex64"}


@OF_ALL_IN_SSM
def test_float32_stays_where_float64_is_allowed_in_ssm(case, left_out):
    call, inputs = ssm_case(case, 9, left_out)
    with jax.enable_x64(True):
        found = jax.eval_shape(functional(call, {}), *parted(inputs))
    names = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert names <= {"float32", "complex64"}
