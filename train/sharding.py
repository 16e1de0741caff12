"""Where arrays live: the mesh, and the placement of batches and state on it."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import compat

AXES = ("data", "fsdp", "sequence")


def make_mesh(config: Mapping, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `config.mesh` over `devices`, by default all that JAX sees; data = -1
    stands for all of them.

    Raises:
        ValueError: sizes that do not multiply to the number of devices, or an axis
            other than "data" larger than 1, which nothing is sharded over so far.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config["mesh"][axis] for axis in AXES]
    for axis, size in zip(AXES[1:], sizes[1:], strict=True):
        if size != 1:
            raise ValueError(f"mesh.{axis} must be 1, got {size}: only data is sharded")
    if sizes[0] == -1:
        sizes[0] = len(devices)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh.data must be -1 or the number of devices {len(devices)}, "
            f"got {sizes[0]}"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES, (AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def context(mesh: Mesh) -> Iterator[None]:
    """What is traced inside is for the devices of the mesh."""
    with compat.devices(mesh.size):
        yield


def check_batch_size(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """`ValueError` unless all devices get equal shares of all micro-batches."""
    devices = mesh.shape["data"]
    if size < 1 or size % (devices * accumulate):
        parts = f"the {devices} devices of mesh.data"
        if accumulate > 1:
            parts += f" times train.accumulate = {accumulate}"
        raise ValueError(f"{name} must be a positive multiple of {parts}, got {size}")


def evaluation_batch_size(config: Mapping, mesh: Mesh, count: int) -> int:
    """Rows in a batch to evaluate `count` examples with: what `train.eval_batch_size`
    or else `train.batch_size` says, no more than are needed, as many on every device.
    """
    options, devices = config["train"], mesh.shape["data"]
    size = min(options["eval_batch_size"] or options["batch_size"], count)
    return -(-size // devices) * devices


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Of a batch: its rows spread over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh, see `rows`."""
    return jax.device_put(dict(batch), rows(mesh))
