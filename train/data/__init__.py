"""Datasets by name: `load(config.data)` returns a `pipeline.Dataset`."""

import inspect
from collections.abc import Mapping

from train import settings
from train.data import (
    arrays,
    checks,
    digits,
    frames,
    images,
    listops,
    moving_digits,
    objectives,
    synthetic,
    video,
)
from train.data.pipeline import Dataset

DATASETS = {
    "digits": digits.load,
    "arrays": arrays.load,
    "listops": listops.load,
    "mnist": images.mnist,
    "cifar": images.cifar,
    "mqar": synthetic.mqar,
    "copying": synthetic.copying,
    "selective_copying": synthetic.selective_copying,
    "induction": synthetic.induction,
    "passkey": synthetic.passkey,
    "moving_digits": moving_digits.moving_digits,
    "clips": video.clips,
    "frames": frames.frames,
}

# Read by `load` or the training loop, not by a dataset.
LOOP_KEYS = ("name", "workers", "reconstruct")


def load(config: Mapping) -> Dataset:
    """The dataset `config["name"]`, built from the other keys of `config`.

    Args:
        config: "name", a key of DATASETS, and that dataset's own arguments ("workers"
            is left to the caller); "reconstruct", True where the inputs of a dataset
            of frames are to be reconstructed and its targets not read.

    Raises:
        ValueError: an unknown name, an argument that the dataset does not have, or one
            of another type than its default.
    """
    name = config["name"]
    settings.check("data.name", name, "")
    if name not in DATASETS:
        raise ValueError(
            f"data.name must be one of {', '.join(sorted(DATASETS))}, got {name!r}"
        )
    arguments = {key: config[key] for key in config if key not in LOOP_KEYS}
    valid = inspect.signature(DATASETS[name]).parameters
    unknown = sorted(set(arguments) - set(valid))
    if unknown:
        raise ValueError(
            f"data: {', '.join(unknown)} is no argument of the dataset {name!r}, "
            f"which has {', '.join(valid)}"
        )
    defaults = {key: valid[key].default for key in arguments}
    loop = {"workers": 0, "reconstruct": False}
    for key, default in (defaults | {k: loop[k] for k in loop if k in config}).items():
        settings.check(f"data.{key}", config[key], default)
    checks.at_least("workers", config.get("workers", 0), 0)
    if "seed" in arguments:
        settings.check_seed("data.seed", arguments["seed"])
    dataset = DATASETS[name](**arguments)
    if config.get("reconstruct"):
        dataset = objectives.reconstruction(dataset, name)
    return dataset


def stretched(config: Mapping, times: int) -> Dataset:
    """The dataset of `config` with sequences `times` as long, all else being equal.

    Raises:
        ValueError: a dataset that has no argument "length", or none of that length, or
            one that is told to take all there is.
    """
    name = config["name"]
    able = {
        name: parameters["length"].default
        for name, make in DATASETS.items()
        if "length" in (parameters := inspect.signature(make).parameters)
    }
    if name not in able:
        raise ValueError(
            f"the dataset {name!r} has one length only; data.name must be one of "
            f"{', '.join(sorted(able))} for others"
        )
    length = config.get("length", able[name])
    if not length:
        raise ValueError(
            f"data.length must be a number of frames to be multiplied, got {length}"
        )
    return load({**config, "length": times * length})
