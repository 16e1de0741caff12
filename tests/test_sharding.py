import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax.core import meta

from configs import common
from layers.facts import FEATURES, SIZE, L, examples_of
from layers.models.build import FRAME_LAYERS, LAYERS
from train import sharding

EIGHT = jax.devices() * 8  # names of devices, to lay out

ONE = common.base().mesh.to_dict()


def mesh_of(**sizes):
    """A mesh without devices."""
    sizes = dict.fromkeys(sharding.AXES, 1) | sizes
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_mesh_over_all_devices():
    mesh = sharding.make_mesh({"mesh": ONE})
    assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {
        "data": jax.device_count()
    }


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh({"mesh": ONE | dict(fsdp=2, tensor=2)}, EIGHT)
    assert [*mesh.shape.values()] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(data=3, fsdp=2),
            r"mesh.data x mesh.fsdp x mesh.tensor = 3 x 2 x 1 must be the number of "
            r"devices 8, got 6",
        ),
        (
            dict(fsdp=3),
            r"mesh.fsdp x mesh.tensor = 3 x 1 must divide the number of devices 8",
        ),
        (dict(fsdp=-1), "mesh.fsdp must be 1 or more, got -1"),
        (dict(data=0), "mesh.data must be 1 or more, or -1, got 0"),
        (dict(sequence=2), "mesh.sequence must be 1, got 2: .* not there yet"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh({"mesh": ONE | sizes}, EIGHT)


def test_batch_size():
    mesh = mesh_of(data=4, fsdp=2, tensor=3)
    sharding.check_batch_size("train.batch_size", 48, mesh, accumulate=3)
    with pytest.raises(
        ValueError,
        match=r"train.batch_size must be a positive multiple of 8, the "
        r"mesh.data x mesh.fsdp = 4 x 2 devices, got 12",
    ):
        sharding.check_batch_size("train.batch_size", 12, mesh)
    with pytest.raises(ValueError, match=r"of 24, .* train.accumulate = 3, got 40"):
        sharding.check_batch_size("train.batch_size", 40, mesh, accumulate=3)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), ("fsdp", "tensor")),
        (("layers", "embed", "mlp"), (4, 8, 6), (None, "fsdp", "tensor")),
        (("mlp",), (6,), ("tensor",)),
        (("embed", "mlp"), (6, 7), (None, None)),
        (("embed", "state", None), (6, 8, 2), (None, "fsdp", None)),
        (("embed", "embed"), (8, 8), ("fsdp", None)),
        (("mine", None), (8, 8), (None, None)),
        (("batch", None), (16, 8), (("data", "fsdp"), None)),
    ],
)
def test_rules(names, shape, expected):
    """fsdp = 4 and tensor = 2: an axis that a size does not divide stays whole."""
    mesh = mesh_of(data=2, fsdp=4, tensor=2)
    assert sharding.spec(names, shape, mesh) == jax.sharding.PartitionSpec(*expected)


def test_rules_know_every_name_of_a_layer():
    """Of all parameters of all layers at the size of their examples."""
    known = {name for name, _ in sharding.RULES} - {"batch"}
    found = set()
    for name, cls in (LAYERS | FRAME_LAYERS).items():
        extra = {"size": SIZE} if name in FRAME_LAYERS else {}
        for fields in examples_of(cls).values():
            layer = cls(**{"features": FEATURES, **extra, **fields})
            x = jnp.zeros((1, L, *extra.get("size", ()), FEATURES))
            boxes = jax.eval_shape(layer.init, jax.random.key(0), x)
            leaves = jax.tree.leaves(boxes, is_leaf=meta.is_axis_metadata)
            for box in leaves:
                found |= {*getattr(box, "names", ())}
    assert found - {None} <= known and {"heads", "mlp", "embed", "state"} <= found


def losses(workdir):
    return [row["loss"] for row in tiny_run.lines(workdir)]


SAME = dict(log_every=1, accumulate=2, batch_size=16)
# Not batch norm: the bias before it has no gradient but rounding errors, which Adam
# makes steps of; the running mean then follows the bias.
FLAGS = ("--config.optimizer.schedule=constant", "--config.model.norm=layer")


@pytest.mark.slow
def test_eight_devices_and_one_train_alike(tmp_path):
    """Twenty steps on each."""
    one, eight = (
        tiny_run.start(
            tmp_path / str(devices),
            tmp_path / f"cache-{devices}",
            *FLAGS,
            "--config.model.layer=s4d",
            devices=devices,
            steps=20,
            **SAME,
        )
        for devices in (1, 8)
    )
    tiny_run.finish(one)
    assert re.search(r"^mesh +data 8", tiny_run.finish(eight)[0], re.M)
    found, expected = losses(tmp_path / "8"), losses(tmp_path / "1")
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(tmp_path):
    """Ten steps on eight devices, ten more on one, beside twenty on one."""

    def run(name, steps, devices=1):
        process = tiny_run.start(
            tmp_path / name,
            tmp_path / "cache",
            *FLAGS,
            devices=devices,
            steps=steps,
            **SAME,
        )
        return tiny_run.finish(process)[0]

    run("one", 20)
    run("eight", 10, devices=8)
    assert "resumed from step 10" in run("eight", 20)
    found, expected = losses(tmp_path / "eight"), losses(tmp_path / "one")
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)
