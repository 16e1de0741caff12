import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_steps
import tiny_run
from flax import linen as nn
from flax.core import meta

from configs import common
from layers import facts
from layers.facts import FEATURES, SIZE, L, examples_of
from layers.models.build import FRAME_LAYERS, LAYERS, build
from layers.parameters import Logical
from train import evaluate, loop, records, runs, sharding, state

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
        (dict(sequence=3), r"fsdp x mesh.tensor x mesh.sequence = 1 x 1 x 3 must div"),
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
        (("batch", "time", None), (16, 6, 8), (("data", "fsdp"), "sequence", None)),
        (("batch", "time", None), (16, 1, 8), (("data", "fsdp"), None, None)),
    ],
)
def test_rules(names, shape, expected):
    """fsdp = 4 and tensor = 2: an axis that a size does not divide stays whole."""
    mesh = mesh_of(data=2, fsdp=4, tensor=2, sequence=3)
    assert sharding.spec(names, shape, mesh) == jax.sharding.PartitionSpec(*expected)


def test_what_has_no_name_is_whole():
    x = jnp.zeros((8, 8))
    boxes = {"ours": Logical(x, (None, "embed")), "plain": x, "scalar": jnp.int32(1)}
    boxes["other"] = nn.Partitioned(x, ("my_axis", None))
    found = {k: v.spec for k, v in sharding.of_tree(boxes, mesh_of(fsdp=4)).items()}
    spec = jax.sharding.PartitionSpec
    assert found == {
        "ours": spec(None, "fsdp"),
        "plain": spec(None, None),
        "scalar": spec(),
        "other": spec(None, None),
    }


def test_rules_know_every_name_of_a_layer():
    """Of all parameters of all layers at the size of their examples."""
    known = {name for name, _ in sharding.RULES} - {"batch", "time"}
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


def on_eight_devices(*arguments):
    """What `sharded_steps` prints in a process of its own, which has eight devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    eight = f"{flags} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, sharded_steps.__file__, *arguments],
        cwd=tiny_run.ROOT,
        env=os.environ | {"XLA_FLAGS": eight, "PYTHONPATH": str(tiny_run.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def sharded():
    """Sizes of what each mesh holds, once its steps are known to be right."""

    def found(layers, *meshes):
        results = json.loads(on_eight_devices("steps", layers, *meshes))
        one = results.pop("")
        assert all(whole == share for whole, share in one["sizes"].values())
        for mesh, result in results.items():
            losses, expected = result["measured"][::2], one["measured"][::2]
            np.testing.assert_allclose(losses, expected, 1e-5, err_msg=mesh)
            norms, expected = result["measured"][1::2], one["measured"][1::2]
            np.testing.assert_allclose(norms, expected, 1e-3, err_msg=mesh)
        return [results[mesh]["sizes"] for mesh in meshes]

    return found


def test_sharded_steps(sharded):
    """Parameters, averages and moments are split, and the steps are those of one
    device."""
    (sizes,) = sharded("s5+mamba2", "data=2,fsdp=2,tensor=2")
    blocks = "stack/repeated/block"
    for part in ("params", "ema"):
        gate = f"{part}/{blocks}_0/gate/kernel"  # embed over fsdp, mlp over tensor
        assert sizes[gate] == [[1, 16, 32], [1, 8, 16]]
        A_log = f"{part}/{blocks}_1/mixer/A_log"  # heads over tensor
        assert sizes[A_log] == [[1, 8], [1, 4]]
    for part in ("params", "ema", "opt_state"):
        arrays = [size for name, size in sizes.items() if name.startswith(part)]
        whole, share = (sum(map(math.prod, x)) for x in zip(*arrays, strict=True))
        assert share < 0.4 * whole, part


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS | FRAME_LAYERS)
def test_sharded_steps_of_every_layer(layer, sharded):
    _, fsdp, _ = sharded(layer, "data=4,fsdp=2", "fsdp=8", "fsdp=2,tensor=4")
    if not facts.why_sequential((LAYERS | FRAME_LAYERS)[layer]):
        sharded(layer, "data=2,sequence=4")
    whole, share = (sum(map(math.prod, x)) for x in zip(*fsdp.values(), strict=True))
    assert share < 0.3 * whole


def losses(workdir):
    return [row["loss"] for row in tiny_run.lines(workdir)]


SAME = dict(log_every=1, accumulate=2, batch_size=16)
# Not batch norm: the bias before it has no gradient but rounding errors, which Adam
# makes steps of; the running mean then follows the bias.
FLAGS = ("--config.optimizer.schedule=constant", "--config.model.norm=layer")


@pytest.mark.slow
def test_a_run_on_eight_devices_is_read_and_goes_on_with_one(tmp_path):
    many, one = tmp_path / "many", tmp_path / "one"
    on_eight_devices("run", str(many), "4", "data=2,fsdp=2,tensor=2")
    results = records.read_results(many)
    assert dict(records.read_config(many).mesh) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "sequence": 1,
    }
    scores = evaluate.scores(runs.load_run(many), "test")
    assert scores == pytest.approx(results["test"], rel=1e-5)
    for workdir in (many, one):
        loop.run(sharded_steps.run_config(8), workdir)
    found, expected = (
        [row["loss"] for row in tiny_run.lines(workdir) if row["split"] == "train"]
        for workdir in (many, one)
    )
    assert len(found) == len(expected) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Starts a run in a workdir of this name, until a step, and returns the workdir and
    what it prints."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, steps, *flags, devices=1, **mesh):
        process = tiny_run.start(
            folder / name,
            folder / "cache",
            *FLAGS,
            *flags,
            *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
            devices=devices,
            steps=steps,
            **SAME,
        )
        return folder / name, tiny_run.finish(process)[0]

    return run


@pytest.fixture(scope="module")
def whole(trained):
    """Twenty steps on one device, with these flags."""
    return functools.cache(lambda *flags: trained(f"one{flags}", 20, *flags)[0])


# Sums over inner features are in another order, and what that rounds a GRU carries on
# from token to token.
INNER = ("--config.model.layer=mamba",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), [dict(devices=8), dict(), dict(devices=4)]),
        ((), [dict(devices=4, fsdp=4), dict(devices=4, data=4)]),
        (INNER, [dict(devices=8, fsdp=2, tensor=2), dict(devices=4, tensor=4)]),
    ],
    ids=["8-1-4", "fsdp4-data4", "tensor2-tensor4"],
)
def test_a_run_goes_on_with_other_devices(flags, parts, trained, whole):
    """Each part goes on with the same run; beside twenty steps on one device."""
    name = "-".join(str(part) for part in parts)
    for number, part in enumerate(parts, 1):
        # Where the other run validates too: its steps are lines like the others.
        steps = 20 if number == len(parts) else 5 * number
        workdir, said = trained(name, steps, *flags, **part)
        assert number == 1 or f"resumed from step {5 * (number - 1)}" in said
    found, expected = losses(workdir), losses(whole(*flags))
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_the_same_mesh_goes_on_bit_by_bit(trained):
    mesh = dict(devices=8, fsdp=2, tensor=2)
    through, _ = trained("through", 20, **mesh)
    for steps in (10, 20):
        cut, said = trained("cut", steps, **mesh)
    assert "resumed from step 10" in said
    assert tiny_run.lines(cut) == tiny_run.lines(through)
    assert tiny_run.weights(cut) == tiny_run.weights(through)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dict(layer="gla", layer_args=dict(heads=6)),
            r"model.layer_args: heads of GLA .* of mesh.tensor = 4, got 6",
        ),
        (
            dict(layer="mamba2", layer_args=dict(head_size=8)),
            r"stack/repeated/block_0/mixer/A_log: heads must be .* = 4, got 3",
        ),
        (
            dict(layer="s4d", features=6, gate="half_glu1"),
            r"stack/repeated/block_0/gate/\w+: inner features .* = 4, got 6",
        ),
    ],
)
def test_what_tensor_must_divide_is_named(model, message):
    config = common.base()
    config.model.update({"features": 12, "depth": 1, "outputs": 2, "length": 4} | model)
    config.model.encoder = "scalar"
    model = build(config.model)
    boxes = state.param_boxes(model, {"inputs": np.zeros((1, 4), np.float32)})
    sharding.check_tensor(model, boxes, mesh_of(data=4))
    with pytest.raises(ValueError, match=message):
        sharding.check_tensor(model, boxes, mesh_of(tensor=4))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            dict(layer="gru"),
            (1, 8),
            "mesh.sequence must be 1 for GRU, got 4: a step is",
        ),
        (
            dict(layer="s5", encoder="grid", grid="cross"),
            (1, 4, 4, 1),
            "mesh.sequence must be 1 for the grid encoder, got 4: its axes are those",
        ),
        (dict(layer="s5"), (1, 6), "mesh.sequence must divide the length .*, 6, got 4"),
        (
            dict(layer="s5", encoder="image"),
            (1, 3, 3, 1),
            "mesh.sequence must divide the length of the sequences, 9, got 4",
        ),
        (
            dict(layer="s5", head="retrieval"),
            (1, 2, 6),
            "mesh.sequence must divide the length of the sequences, 6, got 4",
        ),
    ],
)
def test_what_sequence_must_divide_is_named(model, shape, message):
    config = common.base()
    common.set_layer(config, model["layer"])
    config.model.update({"features": 12, "depth": 1, "outputs": 2, "length": 16})
    config.model.update({"encoder": "scalar"} | model)
    model, inputs = build(config.model), np.zeros(shape, np.float32)
    sharding.check_sequence(model, inputs, mesh_of(data=4))
    with pytest.raises(ValueError, match=message):
        sharding.check_sequence(model, inputs, mesh_of(sequence=4))
