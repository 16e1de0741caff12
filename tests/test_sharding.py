import re

import jax
import numpy as np
import pytest
import tiny_run

from train import sharding

ONE = {"data": -1, "fsdp": 1, "sequence": 1}


def test_mesh_over_all_devices():
    mesh = sharding.make_mesh({"mesh": ONE})
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=999), "the number of devices 1, got 999"),
        (dict(fsdp=2), "mesh.fsdp must be 1, got 2"),
        (dict(sequence=0), "mesh.sequence must be 1, got 0"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh({"mesh": ONE | sizes})


class Mesh:
    """What `check_batch_size` reads of a mesh of eight devices."""

    shape = {"data": 8}  # noqa: RUF012


def test_batch_size():
    sharding.check_batch_size("train.batch_size", 48, Mesh, accumulate=3)
    with pytest.raises(ValueError, match=r"multiple of the 8 devices .* got 12"):
        sharding.check_batch_size("train.batch_size", 12, Mesh)
    with pytest.raises(ValueError, match=r"8 devices .* train.accumulate = 3, got 40"):
        sharding.check_batch_size("train.batch_size", 40, Mesh, accumulate=3)


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
