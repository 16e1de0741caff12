"""What `train.repeat` finds in two trainings."""

import numpy as np
import pytest
import tiny_run
from eight_devices import ALONE, THERE, passed

from train import data, repeat, resolve, sharding
from train.repeat import Trained


def made(losses, weights):
    return Trained(1, np.array(losses), {"w": np.array(weights)})


def test_how_far_one_is_from_the_other():
    first = made([2.0, 1.0], [3.0, 4.0])
    assert repeat.difference(first, made([2.0, 1.0], [3.0, 4.0])) == (True, 0.0, 0.0)
    other = made([2.0, 1.5], [3.0, 4.5])
    assert repeat.difference(first, other) == (False, 0.5, 0.1)
    # The same numbers, and yet not the same bits.
    signed = repeat.difference(made([0.0], [1.0]), made([-0.0], [1.0]))
    assert signed == (False, 0.0, 0.0)


def steps(config, count=3):
    dataset = data.load(config.data)
    return repeat.trained(resolve.complete(config, dataset.spec), dataset, count)


def test_a_training_repeats_itself():
    first, again = (steps(tiny_run.config()) for _ in range(2))
    assert repeat.difference(first, again).same
    config = tiny_run.config()
    config.seed = 1
    assert repeat.difference(first, steps(config)).weights > 0.01


@pytest.mark.parametrize("text", ["", "rows=2", "data=x", "data=1;fsdp=2"])
def test_a_mesh_that_is_none(text):
    with pytest.raises(ValueError, match="--mesh must be AXIS=SIZE, separated by co"):
        repeat.with_mesh(tiny_run.config(), text)


@pytest.mark.slow
@ALONE
def test_a_mesh():
    assert passed(__file__, "meshes_differ and tensor") == 1


@ALONE
@pytest.mark.slow
def test_meshes():
    assert passed(__file__, "meshes_differ") == 3


@THERE
@pytest.mark.parametrize("text", ["fsdp=8", "data=2,fsdp=4", "data=2,tensor=4"])
def test_meshes_differ_by_rounding(text):
    """The same one gives the same bits."""
    config = tiny_run.config()
    config.model.update(layer="mamba", features=8)
    config.model.norm = "layer"
    first, again = steps(config), steps(config)
    assert first.devices == len(sharding.make_mesh(config).devices.flat) == 8
    assert repeat.difference(first, again).same
    other = steps(repeat.with_mesh(config, text))
    found = repeat.difference(first, other)
    assert found.loss < 1e-5 and found.weights < 1e-5
