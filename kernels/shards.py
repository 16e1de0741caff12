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

With time=("sequence",) the length is split too. A recurrence then hands summaries of
its parts from device to device, whose size does not depend on the length (see
`kernels.relay`), and what needs the whole length at once, such as a convolution as long
as the sequence, is computed for a part of the channels instead: XLA sends every device
its channels of all tokens, and its tokens of all channels back.

It acts when a call is traced: what `jax.jit` compiled before stays as it is.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What the axes of an operation's arguments and results are called in their specs.
# SPREAD are channels of what needs the whole length: also over the devices of TIME.
ROWS, CHANNELS, TIME, SPREAD = "rows", "channels", "time", "spread"
SEQUENCE = PartitionSpec(ROWS, TIME, CHANNELS)
BY_TOKEN = PartitionSpec(ROWS, TIME)
BY_CHANNEL = PartitionSpec(CHANNELS)
STATE = PartitionSpec(ROWS, CHANNELS)
BY_ROW = PartitionSpec(ROWS)
LONG = PartitionSpec(ROWS, None, SPREAD)  # [B, L, H] where L is needed as a whole
BY_SPREAD = PartitionSpec(SPREAD)
WHOLE = PartitionSpec()


class _Split(NamedTuple):
    mesh: Mesh
    axes: dict[str, tuple[str, ...]]  # of the mesh, by ROWS, CHANNELS and TIME


_split: ContextVar[_Split | None] = ContextVar("split", default=None)


@contextlib.contextmanager
def over(
    mesh: Mesh,
    rows: Sequence[str] = (),
    channels: Sequence[str] = (),
    time: Sequence[str] = (),
) -> Iterator[None]:
    """Operations traced inside run on every device of a mesh with a part of their own.

    An axis whose size is no multiple of these devices stays whole: each of them then
    computes all of it.

    Args:
        mesh: of the program; its axes are `jax.sharding.AxisType.Auto`.
        rows: the axes of the mesh that the rows of a batch are spread over.
        channels: those that channels or heads are spread over.
        time: those that the tokens of a sequence are spread over.

    Raises:
        ValueError: an axis that the mesh has not, or one that is named twice.
    """
    axes = {ROWS: tuple(rows), CHANNELS: tuple(channels), TIME: tuple(time)}
    for name, named in axes.items():
        if unknown := [axis for axis in named if axis not in mesh.axis_names]:
            raise ValueError(
                f"over: {name} must be axes of the mesh {mesh.axis_names}, got "
                f"{', '.join(map(repr, unknown))}"
            )
    every = [axis for named in axes.values() for axis in named]
    if len({*every}) < len(every):
        raise ValueError(
            f"over: rows, channels and time must not share an axis, got rows "
            f"{axes[ROWS]}, channels {axes[CHANNELS]}, time {axes[TIME]}"
        )
    token = _split.set(_Split(mesh, axes))
    try:
        yield
    finally:
        _split.reset(token)


@contextlib.contextmanager
def rows_alone() -> Iterator[None]:
    """Inside, the length is no longer split: what is traced there has each token of a
    sequence as a row of its own."""
    split = _split.get()
    if split is None:
        yield
        return
    token = _split.set(split._replace(axes=split.axes | {TIME: ()}))
    try:
        yield
    finally:
        _split.reset(token)


def devices(name: str) -> int:
    """Over how many devices `run` splits what the specs call `name`, where their number
    divides it; 1 where `active` is False."""
    if not active():
        return 1
    mesh, axes = _split.get()
    names = (CHANNELS, TIME) if name == SPREAD else (name,)
    return math.prod(mesh.shape[axis] for key in names for axis in axes[key])


def active() -> bool:
    """Whether an operation that is traced now is to be split by `run`."""
    if _split.get() is None:
        return False
    return not jax.sharding.get_abstract_mesh().manual_axes


def run(
    call: Callable,
    arguments: Sequence,
    specs: Sequence,
    results: Any,
    relayed: Callable | None = None,
):
    """call(*arguments), each device with its part.

    Args:
        call: the operation; it returns arrays, or None in the place of one.
        arguments: arrays, trees of them, or None.
        specs: of each argument a `PartitionSpec` of ROWS, CHANNELS, TIME and SPREAD, or
            of a tree a tree of them. An axis of size 1 is everybody's.
        results: the same of what `call` returns.
        relayed: relayed(axes, *arguments) is `call` where TIME is split over these axes
            of the mesh; without it TIME stays whole.
    """
    mesh, axes = _split.get()
    both = (*axes[CHANNELS], *axes[TIME])
    arrays, tree = jax.tree.flatten(tuple(arguments))
    named = []
    for spec, argument in zip(specs, arguments, strict=True):
        whole = isinstance(spec, PartitionSpec)
        count = len(jax.tree.leaves(argument))
        named += [spec] * count if whole else jax.tree.leaves(spec)
    shapes = [x.shape for x in arrays]
    if relayed is None:
        axes = axes | {TIME: ()}
    used = {name: _dividing(mesh, axes[name], name, named, shapes) for name in axes}
    used[SPREAD] = _dividing(mesh, both, SPREAD, named, shapes) or _dividing(
        mesh, axes[CHANNELS], SPREAD, named, shapes
    )

    def place(spec, shape=None):
        sizes = [None] * len(spec) if shape is None else shape
        return PartitionSpec(
            *(
                None if size == 1 else used.get(name)
                for name, size in zip(spec, sizes, strict=False)
            )
        )

    if used[TIME]:
        call = partial(relayed, used[TIME])
    if moved := devices(TIME) > 1:
        arrays = [_by_token(*each) for each in zip(arrays, named, strict=True)]
    answer = jax.shard_map(
        lambda *parts: call(*jax.tree.unflatten(tree, parts)),
        mesh=mesh,
        in_specs=tuple(map(place, named, shapes)),
        out_specs=jax.tree.map(place, results),
    )(*arrays)
    if not moved:
        return answer
    return jax.tree.map(
        lambda spec, x: x if x is None else _by_token(x, spec), results, answer
    )


def _by_token(x, spec):
    """x of a spec LONG, which goes over to channels from lying by tokens, and back, its
    gradient too; XLA, left to itself, may keep it by channels and gather what is made
    of it."""
    mesh, axes = _split.get()
    if spec != LONG:
        return x
    places = [
        axes[name] if size % math.prod(mesh.shape[a] for a in axes[name]) == 0 else None
        for name, size in zip(SEQUENCE, x.shape, strict=False)
    ]
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(*places))
    )


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
    return tuple(axis for axis in axes if mesh.shape[axis] > 1) or None
