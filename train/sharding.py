"""Where arrays live: the mesh, and the placement of batches and state on it.

A program is written for one device; XLA splits it (GSPMD). What is said here is where
its inputs and outputs lie, and in `context` where the residual stream does.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import shards
from layers import facts
from layers.models import residual
from layers.models.model import Model
from layers.models.video import Video

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # the rows of a batch are spread over both

# (logical axis of an array, mesh axes that split it), by precedence: a rule holds where
# the mesh axes have not split another axis of the array before, and their sizes divide
# its length. What no rule splits is whole on every device; "layers", the axis of
# `layers.models.stack`, is never split: the loop over it would gather all.
RULES = (
    ("batch", ROWS),
    ("time", "sequence"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "fsdp"),
    ("vocab", "fsdp"),
    ("state", "fsdp"),
    ("heads", "fsdp"),
    ("out", "fsdp"),
    ("channel", "fsdp"),
)
# These must divide: a layer that is not split is not what mesh.tensor asks for.
STRICT = tuple(name for name, axes in RULES if axes == "tensor")


def make_mesh(config: Mapping, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `config.mesh` over `devices`, by default all there are; data = -1 stands
    for those that the other axes leave.

    Raises:
        ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: config["mesh"][axis] for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and (axis, size) != ("data", -1):
            lower = "1 or more, or -1" if axis == "data" else "1 or more"
            raise ValueError(f"mesh.{axis} must be {lower}, got {size}")
    others = math.prod(sizes[axis] for axis in AXES if axis != "data")
    if len(devices) % others:
        raise ValueError(
            f"{_product(sizes, *AXES[1:])} must divide the number of devices "
            f"{len(devices)}, got {others}"
        )
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // others
    if sizes["data"] * others != len(devices):
        raise ValueError(
            f"{_product(sizes, *AXES)} must be the number of devices {len(devices)}, "
            f"got {sizes['data'] * others}; mesh.data = -1 takes those that are left"
        )
    shape = tuple(sizes.values())
    return Mesh(_arranged(devices, shape), AXES, (AxisType.Auto,) * len(AXES))


def _product(sizes, *axes):
    """Such as "mesh.fsdp x mesh.tensor = 2 x 3", without a mesh.sequence of 1."""
    axes = [axis for axis in axes if axis != "sequence" or sizes[axis] != 1]
    names = " x ".join(f"mesh.{axis}" for axis in axes)
    return f"{names} = {' x '.join(str(sizes[axis]) for axis in axes)}"


def _arranged(devices, shape):
    """Devices that are neighbours on the mesh are neighbours in the machine."""
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        # Between slices there is a network, over which only the first axis goes.
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def rows_mesh() -> Mesh:
    """The mesh that spreads rows over all devices and keeps the rest whole, for what
    reads a run: its own may have been of other devices."""
    return make_mesh({"mesh": dict.fromkeys(AXES, 1) | {"data": -1}})


def row_devices(mesh: Mesh) -> int:
    """Among how many devices the rows of a batch are shared."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch_size(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """`ValueError` unless all devices get equal shares of all micro-batches."""
    devices = row_devices(mesh)
    if size < 1 or size % (devices * accumulate):
        parts = f"{_product(mesh.shape, *ROWS)} devices"
        if accumulate > 1:
            parts += f" times train.accumulate = {accumulate}"
        raise ValueError(
            f"{name} must be a positive multiple of {devices * accumulate}, the "
            f"{parts}, got {size}"
        )


def evaluation_batch_size(config: Mapping, mesh: Mesh, count: int) -> int:
    """Rows in a batch to evaluate `count` examples with: what `train.eval_batch_size`
    or else `train.batch_size` says, no more than are needed, as many on every device.
    """
    options, devices = config["train"], row_devices(mesh)
    size = min(options["eval_batch_size"] or options["batch_size"], count)
    return -(-size // devices) * devices


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh
) -> PartitionSpec:
    """How RULES split an array of `shape` whose axes have the logical `names`."""
    places, used = [None] * len(shape), set()
    for name, axes in RULES:
        axes = (axes,) if isinstance(axes, str) else axes
        count = math.prod(mesh.shape[axis] for axis in axes)
        if count == 1 or used & {*axes}:
            continue
        for i, length in enumerate(shape):
            if names[i] == name and places[i] is None and length % count == 0:
                places[i] = axes if len(axes) > 1 else axes[0]
                used |= {*axes}
                break
    return PartitionSpec(*places)


def of_tree(boxes: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a tree by the names in its box
    (`layers.parameters.Logical`); one without a box is whole on every device."""

    def place(leaf):
        shape = meta.unbox(leaf).shape
        return NamedSharding(mesh, spec(_names(leaf, shape), shape, mesh))

    return jax.tree.map(place, boxes, is_leaf=meta.is_axis_metadata)


def _names(leaf, shape):
    """The logical names of the axes, None for one without: also of what has no box, or
    one that others made."""
    names = getattr(leaf, "names", None)
    return names if names and len(names) == len(shape) else (None,) * len(shape)


def check_tensor(model: Any, boxes: Any, mesh: Mesh) -> None:
    """`ValueError` where mesh.tensor does not divide the heads or the inner features of
    a layer.

    Args:
        model: of `layers.models.build.build`, or one of the user's own.
        boxes: the shapes of its parameters in their boxes.
        mesh: of the run.
    """
    count = mesh.shape["tensor"]
    if count == 1:
        return
    for mixer in _mixers(model):
        heads = getattr(mixer, "heads", count)
        if heads % count:
            raise ValueError(
                f"model.layer_args: heads of {type(mixer).__name__} must be a multiple "
                f"of mesh.tensor = {count}, got {heads}"
            )
    leaves = jax.tree.leaves_with_path(boxes, is_leaf=meta.is_axis_metadata)
    for path, box in leaves:
        shape = meta.unbox(box).shape
        for name, length in zip(_names(box, shape), shape, strict=True):
            if name in STRICT and length % count:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"model.features, or the field of the layer that sets the width of "
                    f"{where}: {'heads' if name == 'heads' else 'inner features'} must "
                    f"be a multiple of mesh.tensor = {count}, got {length}"
                )


def check_sequence(model: Any, inputs: Any, mesh: Mesh) -> None:
    """`ValueError` where mesh.sequence does not divide the length of the sequences, or
    where a layer cannot be split over it.

    Args:
        model: as in `check_tensor`.
        inputs: of a batch, arrays or their shapes [B, L, ...].
        mesh: of the run.
    """
    count = mesh.shape["sequence"]
    if count == 1:
        return
    for mixer in _mixers(model):
        if reason := facts.why_sequential(mixer):
            raise ValueError(
                f"mesh.sequence must be 1 for {type(mixer).__name__}, got {count}: "
                f"{reason}"
            )
    if getattr(model, "encoder", "") == "grid":
        raise ValueError(
            f"mesh.sequence must be 1 for the grid encoder, got {count}: its axes are "
            "those of a picture, there is no one length"
        )
    for leaf in jax.tree.leaves(inputs):
        length = _length(model, leaf.shape)
        if length % count:
            raise ValueError(
                f"mesh.sequence must divide the length of the sequences, {length}, got "
                f"{count}"
            )


def _length(model, shape):
    """Tokens of the sequences that a model makes of an input [B, ...]."""
    if getattr(model, "encoder", "") == "image":
        return math.prod(shape[1:-1])
    return shape[2 if getattr(model, "head", "") == "retrieval" else 1]


def _mixers(model):
    """Of the blocks of a model of `layers.models`; none of another."""
    blocks = model.stack().pattern if isinstance(model, Model | Video) else ()
    for make in blocks:
        mixer = make()
        while hasattr(mixer, "mixer"):  # a block has one, and so has a grid
            mixer = mixer.mixer()
        yield mixer


@contextlib.contextmanager
def context(mesh: Mesh | None) -> Iterator[None]:
    """What steps on several devices are traced in; nothing on one, or without a mesh.

    To be entered inside of the function that is compiled: a function that was traced
    before is not traced again because something outside of it has changed.
    """
    if mesh is None or mesh.size == 1:
        yield
        return

    def place(x, names):
        where = NamedSharding(mesh, spec(names, x.shape, mesh))
        return jax.lax.with_sharding_constraint(x, where)

    with contextlib.ExitStack() as entered:
        entered.enter_context(residual.placed_by(place))
        entered.enter_context(shards.over(mesh, ROWS, ("tensor",), ("sequence",)))
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Of a batch: its rows spread over the axes ROWS."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which rows of a batch of `count` this process has to prepare: those that its
    devices hold, ascending. Where the mesh spreads something else over processes,
    several hold the same.
    """
    held = rows(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[at] for (at,) in held]))


def of_state(init_state: Callable, size: int, mesh: Mesh, others: Any = None) -> Any:
    """The sharding of every array of a model's state: the axis of its `size` sequences
    over the axes ROWS.

    Args:
        init_state: of the model.
        size: sequences.
        mesh: the devices.
        others: what is said of all other axes; None: they are whole.
    """
    # The axis of the sequences is the one that grows with their number.
    one, two = (jax.eval_shape(lambda n=n: init_state(n)) for n in (size, 2 * size))

    def spread(x, larger):
        pairs = zip(x.shape, larger.shape, strict=True)
        axes = [ROWS if a != b else others for a, b in pairs]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(spread, one, two)


def keep_rows(init_state: Callable, mesh: Mesh | None, size: int, state: Any) -> Any:
    """The state of `size` sequences inside of a step, its rows where those of the batch
    are; its other axes are the compiler's to place. As it is on one device."""
    if mesh is None or mesh.size == 1:
        return state
    places = of_state(init_state, size, mesh, PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(state, places)


def batch_rows(mesh: Mesh, own: int) -> int:
    """How many rows a batch has of which this process has prepared `own`."""
    shares = row_devices(mesh)
    return own * shares // len(own_rows(mesh, shares))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh, see `rows`.

    Args:
        batch: the rows of `own_rows` of it, which are all in a run of one process.
        mesh: the devices, those of other processes among them.
    """
    where = rows(mesh)
    if where.is_fully_addressable:
        return jax.device_put(dict(batch), where)

    def put(x):
        count = batch_rows(mesh, len(x))
        held = own_rows(mesh, count)

        def part(at):
            start, stop, _ = at[0].indices(count)
            first, last = np.searchsorted(held, (start, stop))
            return x[first:last]

        return jax.make_array_from_callback((count, *x.shape[1:]), where, part)

    return jax.tree.map(put, dict(batch))
