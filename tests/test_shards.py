"""`kernels.shards`: on many devices an operation is what it is on one.

Values and every gradient on eight emulated devices (in a process of its own, see
`test_eight_devices`), two parts of the channels and four of the rows.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import test_transformations
from eight_devices import ALONE, DEVICES, THERE, passed
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import compat, dispatch, linear_scan, shards
from kernels.check.cases import OPERATIONS, Case
from kernels.check.comparison import rounded
from kernels.tolerance import assert_close

SIZES = {"B": 4, "D": 20, "H": 4, "G": 4}
AXES = ("data", "fsdp", "tensor", "sequence")
# Of the devices: rows and channels, and rows and time.
LAYOUTS = {"channels": (2, 2, 2, 1), "time": (2, 1, 1, 4)}


def mesh(*sizes):
    sizes = sizes or (len(jax.devices()), 1, 1)
    sizes = (*sizes, *[1] * (len(AXES) - len(sizes)))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def over(some):
    return shards.over(some, ("data", "fsdp"), ("tensor",), ("sequence",))


def inputs_of(op, variant, length=20, B=SIZES["B"], **options):
    operation = OPERATIONS[op]
    case = Case(variant, length, **options)
    sizes = {k: n for k, n in (SIZES | {"B": B}).items() if k in operation.small}
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
FIRST = [(op, o.variants[0]) for op, o in OPERATIONS.items()]
OPTIONS = [{}, {"state": True, "reset": True}]
OPTIONS += [OPTIONS[1] | {"reverse": True}]


def holds_on_many_devices(op, variant, options, layout):
    call, static, inputs = inputs_of(op, variant, **options)
    values, gradients = results(call, static, inputs)
    found, found_gradients = results(call, static, inputs, mesh(*LAYOUTS[layout]))
    assert_close(found, values)
    assert_close(found_gradients, gradients, "gradient")


@THERE
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=["none", "all", "reverse"])
@pytest.mark.parametrize(("op", "variant"), EVERY)
def test_is_what_it_is_on_one_device(op, variant, options, layout):
    holds_on_many_devices(op, variant, options, layout)


@ALONE
def test_eight_devices():
    """One variant of every operation, and what needs several devices to be seen."""
    count = len(FIRST) * len(LAYOUTS)
    assert passed(__file__, "test_first or needs_devices") == count + 3


@ALONE
@pytest.mark.slow
def test_eight_devices_every_variant():
    count = passed(__file__, "test_is_what_it_is_on_one_device")
    assert count == len(EVERY) * len(OPTIONS) * len(LAYOUTS)


@THERE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "variant"), FIRST)
def test_first(op, variant, layout):
    holds_on_many_devices(op, variant, OPTIONS[1], layout)


COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
)


def compiled(op, variant, some, gradient):
    """The program on arrays that are spread as the rows of a batch are."""
    call, static, inputs = inputs_of(op, variant, B=DEVICES, state=True, reset=True)
    split = test_transformations.split_arguments(op, variant)

    def placed(name, x):
        spec = PartitionSpec(("data", "fsdp")) if name in split else PartitionSpec()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(some, spec)
        )

    shapes = {
        name: jax.tree.map(partial(placed, name), x) for name, x in inputs.items()
    }
    run = test_transformations.functional(call, static)
    if not gradient:

        def run(moving, fixed):
            return call(**moving, **fixed, **static)

    with over(some):
        return jax.jit(run).lower(*test_transformations.parted(shapes)).compile()


@THERE
def test_nothing_is_sent_needs_devices():
    """Forward; and with gradients no more than what all rows share, and a sum."""
    some = mesh(4, 2, 1)
    for op, variant in FIRST:
        if op in ("vandermonde", "cauchy"):  # of parameters alone
            continue
        forward = compiled(op, variant, some, gradient=False).as_text()
        assert not COLLECTIVE.findall(forward), op
        both = compiled(op, variant, some, gradient=True).as_text()
        assert {kind for _, kind in COLLECTIVE.findall(both)} <= {"all-reduce"}, op
        rows = f"[{DEVICES}," if op != "butterfly_conv" else "[8,20"
        assert not [x for x, _ in COLLECTIVE.findall(both) if rows in x], op


@THERE
def test_a_part_on_every_device_needs_devices():
    x = jnp.ones((8, 5, 6))
    with over(mesh(2, 2, 2)):
        text = str(jax.make_jaxpr(linear_scan)(x, x))
    assert "shard_map" in text
    assert "f32[2,5,3]" in text
    with over(mesh(8, 1, 1)):  # 6 rows are not for 8 devices: all have the whole
        text = str(jax.make_jaxpr(linear_scan)(x[:6], x[:6]))
    assert "shard_map" in text
    assert "f32[6,5,6]" in text


@THERE
def test_xla_splits_no_kernel_needs_devices():
    """So nothing of it is left to XLA."""
    assert compat.partitioned_by_xla()
    seen = []
    table = {"seen": Seen(seen)}

    def call(x):
        dispatch.pick("linear_scan", table, None)
        return x

    with over(mesh(8, 1, 1)):
        assert shards.active()
        jax.jit(lambda x: shards.run(call, [x], [shards.BY_ROW], shards.BY_ROW))(
            jnp.ones(8)
        )
    assert seen == [False]


class Seen:
    """A backend that notes whether XLA would have to split it."""

    def __init__(self, seen):
        self.seen = seen

    def unsupported(self, *arguments):
        self.seen.append(compat.partitioned_by_xla())


def test_within_a_shard_map_of_ones_own_nothing_is_split():
    some = mesh(len(jax.devices()), 1, 1)
    found = []

    def device(x):
        found.append(shards.active())
        return linear_scan(x, x)[0]

    spec = PartitionSpec("data")
    x = jnp.ones((len(jax.devices()), 5, 3))
    with over(some):
        assert shards.active()
        jax.jit(jax.shard_map(device, mesh=some, in_specs=spec, out_specs=spec))(x)
    assert found == [False]
    assert not shards.active()


@pytest.mark.parametrize(
    ("rows", "channels", "message"),
    [
        (("pod",), (), r"rows must be axes of the mesh \('data', 'fsdp', .*got 'pod'"),
        ((), ("model",), "channels must be axes of the mesh .* got 'model'"),
        (("data",), ("data",), r"must not share an axis, got rows \('data',\)"),
    ],
)
def test_axes_that_cannot_be(rows, channels, message):
    some = mesh(len(jax.devices()), 1, 1)
    with pytest.raises(ValueError, match=message), shards.over(some, rows, channels):
        pass


def test_errors_are_those_of_the_operation():
    some = mesh(len(jax.devices()), 1, 1)
    with over(some), pytest.raises(ValueError, match="linear_scan: a must be"):
        linear_scan(jnp.ones((3, 2)), jnp.ones((1, 5, 3)))
