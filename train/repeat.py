"""Whether a training repeats itself here, bit by bit, and how far meshes differ.

    python -m train.repeat --config pixels:digits,layer=s5 --steps 20
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m train.repeat \\
        --config synthetic:mqar,layer=mamba --mesh data=1,fsdp=8 --mesh data=2,tensor=4

The first steps of a config are trained twice on its own mesh, and once on every other
that --mesh names; nothing is written. A table says of each, beside the first, on how
many devices it was, whether all losses and all weights are the same bits, the largest
relative difference of a loss, and that of the weights, |a - b| / |a| over all of them.
The exit code is 1 where the same config on the same mesh, compiled anew, gave other
bits.
"""

from typing import Any, NamedTuple

from absl import flags

from train import main as command_line

STEPS = flags.DEFINE_integer("steps", 10, "steps to train each time", lower_bound=1)
MESHES = flags.DEFINE_multi_string(
    "mesh", [], "another mesh, such as data=2,tensor=4; may be given several times"
)


class Trained(NamedTuple):
    """What steps came to.

    Attributes:
        devices: how many there were.
        losses: float [steps].
        weights: path -> array, on the host.
    """

    devices: int
    losses: Any
    weights: dict


class Difference(NamedTuple):
    """Of one training beside another.

    Attributes:
        same: whether all bits are.
        loss, weights: the largest relative difference of a loss, and that of all
            weights as one vector.
    """

    same: bool
    loss: float
    weights: float


def trained(config, dataset, steps: int) -> Trained:
    """The first steps of a run of `config`, which is complete."""
    import contextlib
    import functools

    import jax
    import numpy as np

    from layers.models.build import build
    from train import parts, resolve, sharding, state

    mesh, size = sharding.make_mesh(config), config.train.batch_size
    resolve.check(config, mesh)
    rows = functools.partial(sharding.own_rows, mesh)
    samples = dataset.samples(size, config.seed, rows)
    samples = [sharding.place(sample, mesh) for sample in samples]
    model = build(config.model)
    made = parts.assemble(config, dataset.spec, mesh, model, samples[0])
    compiled = [made.trace(sample).lower().compile() for sample in samples]
    step, current, losses = parts.by_shape(compiled, samples), made.create(), []
    stream = dataset.train(size, config.seed, rows=rows)
    with contextlib.closing(stream) as batches:
        for _ in range(steps):
            current, measures = step(current, sharding.place(next(batches), mesh))
            losses.append(float(measures["loss"]))
    weights = jax.device_get(current.params)
    return Trained(mesh.size, np.array(losses), dict(state.named_leaves(weights)))


def difference(first: Trained, other: Trained) -> Difference:
    """How far `other` is from `first`."""
    import numpy as np

    pairs = [(first.losses, other.losses)]
    pairs += [(first.weights[name], other.weights[name]) for name in first.weights]
    same = all(a.tobytes() == b.tobytes() for a, b in pairs)
    (losses, theirs), *weights = pairs
    loss = np.max(np.abs(losses - theirs) / np.maximum(np.abs(losses), 1e-30))
    apart = sum(np.sum(np.abs(a - b).astype(np.float64) ** 2) for a, b in weights)
    size = sum(np.sum(np.abs(a).astype(np.float64) ** 2) for a, _ in weights)
    return Difference(same, float(loss), float(np.sqrt(apart / size)))


def with_mesh(config, text: str):
    """`config` on the mesh that --mesh says; axes that it does not name are 1."""
    from train import sharding

    result = config.copy_and_resolve_references()
    sizes = dict.fromkeys(sharding.AXES, 1)
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"--mesh must be AXIS=SIZE, separated by commas, the axes of "
                f"{', '.join(sizes)}, got {text!r}"
            )
        sizes[axis] = int(size)
    result.mesh.update(sizes)
    return result


def main(argv: list[str]) -> int:
    command_line.check_arguments(argv)
    if command_line.place() is not None:
        raise ValueError(
            "--processes must be 1: this is for the devices of one process"
        )
    import jax
    from rich.console import Console
    from rich.table import Table

    from train import data, exclusions, resolve

    exclusions.apply(command_line.CERTIFICATE.value)
    config = command_line.CONFIG.value
    dataset = data.load(config.data)
    config = resolve.complete(config, dataset.spec, None)
    others = {text: with_mesh(config, text) for text in MESHES.value}
    first = trained(config, dataset, STEPS.value)
    again = trained(config, dataset, STEPS.value)
    rows = [("the same again", again.devices, difference(first, again))]
    for text, other in others.items():
        made = trained(other, dataset, STEPS.value)
        rows.append((text, made.devices, difference(first, made)))
    kind = jax.devices()[0].device_kind
    table = Table(
        title=f"{STEPS.value} steps, beside the first {first.devices} x {kind}"
    )
    for name in ("mesh", "devices", "same bits", "loss", "weights"):
        table.add_column(name)
    for text, devices, found in rows:
        same = "yes" if found.same else "no"
        numbers = f"{found.loss:.1e}", f"{found.weights:.1e}"
        table.add_row(text, str(devices), same, *numbers)
    Console().print(table)
    return int(not rows[0][2].same)


if __name__ == "__main__":
    command_line.command(main)
