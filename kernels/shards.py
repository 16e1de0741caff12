"""Operations over many devices: each computes its own rows and channels.

XLA splits a program over the devices of a mesh, but not a kernel, and not its own FFT,
for which it gathers the whole batch on every device. An operation itself knows which of
its axes are independent of each other: the rows of a batch, and channels or heads.
Under

    with kernels.shards.over(mesh, rows=("data", "fsdp"), channels=("tensor",)):

every operation that is traced runs in `jax.shard_map` over these axes of the mesh: each
device has a part of the rows and channels, with its own kernel, and nothing is sent.
What all parts share, such as a filter where rows are split, is whole on every device;
its gradient is added up over them. XLA partitions the rest of the program. Without the
context, and inside a `jax.shard_map` of one's own, an operation is as it is called.

It acts when a call is traced: what `jax.jit` compiled before stays as it is.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

# What the axes of an operation's arguments and results are called in their specs.
ROWS, CHANNELS = "rows", "channels"
SEQUENCE = PartitionSpec(ROWS, None, CHANNELS)
BY_TOKEN = PartitionSpec(ROWS)
BY_CHANNEL = PartitionSpec(CHANNELS)
STATE = PartitionSpec(ROWS, CHANNELS)
WHOLE = PartitionSpec()


class _Split(NamedTuple):
    mesh: Mesh
    axes: dict[str, tuple[str, ...]]  # of the mesh, by ROWS and CHANNELS


_split: ContextVar[_Split | None] = ContextVar("split", default=None)


@contextlib.contextmanager
def over(
    mesh: Mesh, rows: Sequence[str] = (), channels: Sequence[str] = ()
) -> Iterator[None]:
    """Operations traced inside run on every device of a mesh with a part of their own.

    An axis whose size is no multiple of these devices stays whole: each of them then
    computes all of it.

    Args:
        mesh: of the program; its axes are `jax.sharding.AxisType.Auto`.
        rows: the axes of the mesh that the rows of a batch are spread over.
        channels: those that channels or heads are spread over.

    Raises:
        ValueError: an axis that the mesh has not, or one that is named twice.
    """
    axes = {ROWS: tuple(rows), CHANNELS: tuple(channels)}
    for name, named in axes.items():
        if unknown := [axis for axis in named if axis not in mesh.axis_names]:
            raise ValueError(
                f"over: {name} must be axes of the mesh {mesh.axis_names}, got "
                f"{', '.join(map(repr, unknown))}"
            )
    both = [*axes[ROWS], *axes[CHANNELS]]
    if len({*both}) < len(both):
        raise ValueError(
            f"over: rows and channels must not share an axis, got rows {axes[ROWS]}, "
            f"channels {axes[CHANNELS]}"
        )
    token = _split.set(_Split(mesh, axes))
    try:
        yield
    finally:
        _split.reset(token)


def active() -> bool:
    """Whether an operation that is traced now is to be split by `run`."""
    if _split.get() is None:
        return False
    return not jax.sharding.get_abstract_mesh().manual_axes


def run(call: Callable, arguments: Sequence, specs: Sequence, results: Any):
    """call(*arguments), each device with its part.

    Args:
        call: the operation; it returns arrays, or None in the place of one.
        arguments: arrays, trees of them, or None.
        specs: of each argument a `PartitionSpec` of ROWS and CHANNELS, or of a tree a
            tree of them. An axis of size 1 is everybody's.
        results: the same of what `call` returns.
    """
    mesh, axes = _split.get()
    arrays, tree = jax.tree.flatten(tuple(arguments))
    named = []
    for spec, argument in zip(specs, arguments, strict=True):
        whole = isinstance(spec, PartitionSpec)
        count = len(jax.tree.leaves(argument))
        named += [spec] * count if whole else jax.tree.leaves(spec)
    shapes = [x.shape for x in arrays]
    used = {name: _dividing(mesh, axes[name], name, named, shapes) for name in axes}

    def place(spec, shape=None):
        sizes = [None] * len(spec) if shape is None else shape
        return PartitionSpec(
            *(
                None if size == 1 else used.get(name)
                for name, size in zip(spec, sizes, strict=False)
            )
        )

    return jax.shard_map(
        lambda *parts: call(*jax.tree.unflatten(tree, parts)),
        mesh=mesh,
        in_specs=tuple(map(place, named, shapes)),
        out_specs=jax.tree.map(place, results),
    )(*arrays)


def _dividing(mesh, axes, name, specs, shapes):
    """The axes of the mesh that `name` is split over; none where they do not divide."""
    sizes = {
        size
        for spec, shape in zip(specs, shapes, strict=True)
        for part, size in zip(spec, shape, strict=False)
        if part == name and size > 1
    }
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if not sizes or any(size % devices for size in sizes):
        return None
    return axes or None
