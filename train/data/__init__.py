"""Datasets by name: `load(config.data)` returns a `pipeline.Dataset`."""

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping

import numpy as np

from train import settings
from train.data import (
    aan,
    arrays,
    buckets,
    cast,
    checks,
    digits,
    frames,
    images,
    imdb,
    listops,
    moving_digits,
    objectives,
    pathfinder,
    synthetic,
    video,
)
from train.data.pipeline import Dataset
from train.data.sources import Example, Rows
from train.data.spec import Spec

DATASETS = {
    "digits": digits.load,
    "arrays": arrays.load,
    "aan": aan.load,
    "imdb": imdb.load,
    "listops": listops.load,
    "pathfinder": pathfinder.load,
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

# What those say of themselves whose files need not be there, or are costly to make.
SPECS = {
    "aan": aan.spec,
    "imdb": imdb.spec,
    "listops": listops.spec,
    "pathfinder": pathfinder.spec,
    "mnist": images.mnist_spec,
    "cifar": images.cifar_spec,
    "moving_digits": moving_digits.spec,
    "frames": frames.spec,
}

# Read by `load` or the training loop, not by a dataset.
LOOP_KEYS = ("name", "workers", "reconstruct", "objective", "buckets")

EMPTY = inspect.Parameter.empty


def load(config: Mapping) -> Dataset:
    """The dataset `config["name"]`, built from the other keys of `config`.

    Args:
        config: "name", a key of DATASETS or the dotted path of a function of the user's
            own ("package.module.function") that returns a `Dataset`, which is imported
            and so executed, and that dataset's own arguments ("workers" is left to the
            caller); "reconstruct", True where the inputs of a dataset of frames are to
            be reconstructed and its targets not read; "objective", what else the
            inputs are to be asked for, see `objectives.asked`; "buckets", of what
            lengths the batches to train on are, see `buckets.Options`.

    Raises:
        ValueError: an unknown name, an argument that the dataset does not have or one
            that it lacks, one of another type than its default, or a function that
            returns something else; numbers that int32 or float32 cannot hold, now or
            when the example is made that has them.
    """
    name = config["name"]
    settings.check("data.name", name, "")
    make = get(name)
    arguments = {key: config[key] for key in config if key not in LOOP_KEYS}
    _check_arguments(name, arguments, inspect.signature(make).parameters)
    loop = {"workers": 0, "reconstruct": False}
    for key in (key for key in loop if key in config):
        settings.check(f"data.{key}", config[key], loop[key])
    checks.at_least("workers", config.get("workers", 0), 0)
    if "seed" in arguments:
        settings.check_seed("data.seed", arguments["seed"])
    dataset = make(**arguments)
    if name not in DATASETS:
        _check_dataset(name, dataset)
        dataset = _narrow(name, dataset)
    if config.get("reconstruct"):
        dataset = objectives.reconstruction(dataset, name)
    if config.get("objective"):
        dataset = objectives.asked(dataset, config["objective"])
    options = buckets.read(config.get("buckets", {}))
    if options:
        buckets.lengths(options, dataset.spec)
        spec = dataset.spec.but(padded=True)
        dataset = dataclasses.replace(dataset, spec=spec, buckets=options)
    return dataset


def known(config: Mapping) -> Spec | None:
    """The spec of the dataset of a config as far as the config alone tells; None where
    the dataset has to be loaded for it.

    Raises:
        ValueError: a name or an argument that `load` does not take.
    """
    name = config["name"]
    settings.check("data.name", name, "")
    if name not in SPECS:
        return None
    arguments = {key: config[key] for key in config if key not in LOOP_KEYS}
    _check_arguments(name, arguments, inspect.signature(get(name)).parameters)
    read = inspect.signature(SPECS[name]).parameters
    spec = SPECS[name](**{key: x for key, x in arguments.items() if key in read})
    if spec is not None and config.get("reconstruct"):
        spec = objectives.reconstructed(spec, name)
    if spec is not None and config.get("objective"):
        spec = objectives.asked_spec(spec, config["objective"])
    if spec is not None and buckets.read(config.get("buckets", {})):
        spec = spec.but(padded=True)
    return spec


def get(name: str) -> Callable[..., Dataset]:
    """What makes the dataset called `name`, as `load` takes it; a dotted path is
    imported.

    Raises:
        ValueError: an unknown name; lists the names, or where Python looked.
    """
    if name in DATASETS:
        return DATASETS[name]
    parts = name.split(".")
    if len(parts) < 2 or not all(map(str.isidentifier, parts)):
        raise ValueError(
            f"data.name must be one of {', '.join(sorted(DATASETS))}, or the dotted "
            f"path of a function that returns a Dataset, got {name!r}"
        )
    module, _, function = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # What the user's own module fails to import is the user's to see.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        looked = ", ".join(place or "." for place in sys.path)
        raise ValueError(
            f"data.name is {name!r}, but there is no module {error.name!r}; Python "
            f"looked in {looked}: start the command in the folder that has it, or put "
            "that into PYTHONPATH"
        ) from error
    make = getattr(found, function, None)
    if not callable(make):
        place = getattr(found, "__file__", None) or "a folder"
        raise ValueError(
            f"data.name is {name!r}, but the module {module!r} ({place}) has no "
            f"function {function!r}"
        )
    return make


def foreign(config: Mapping) -> list[str]:
    """The dataset of a config, if it is not of this project: `load` imports what it
    names, so that a config from elsewhere is to be asked first."""
    name = config.get("name")
    settings.check("data.name", name, "")
    return [name] if name not in DATASETS and "." in name else []


def _check_arguments(name: str, arguments: Mapping, valid: Mapping) -> None:
    kinds = {parameter.kind for parameter in valid.values()}
    unknown = sorted(set(arguments) - set(valid))
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"data: {', '.join(unknown)} is no argument of the dataset {name!r}, "
            f"which has {', '.join(valid) or 'none'}"
        )
    starred = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for key, parameter in valid.items():
        if parameter.default is not EMPTY:
            if key in arguments and parameter.default is not None:
                settings.check(f"data.{key}", arguments[key], parameter.default)
        elif key not in arguments and parameter.kind not in starred:
            raise ValueError(
                f"data.{key} is missing, an argument of the dataset {name!r} that has "
                "no default"
            )


def _check_dataset(name: str, dataset) -> None:
    """Raises a `ValueError` unless a function of the user's own returned a dataset that
    can be trained on."""
    said = f"data.name: {name} must return a train.data.pipeline.Dataset"
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{said}, got {type(dataset).__name__}")
    if not isinstance(dataset.spec, Spec):
        raise ValueError(
            f"{said} whose spec is a train.data.spec.Spec, got "
            f"{type(dataset.spec).__name__}"
        )
    if not dataset.sources.get("train"):
        raise ValueError(
            f"{said} with examples to train on, got the splits "
            f"{ {k: len(v) for k, v in dataset.sources.items()} }"
        )
    example = dataset.sources["train"][0]
    if dataset.finish is not None:
        example = dataset.finish(example)
    missing = [key for key in ("inputs", "targets", "mask") if key not in example]
    if missing:
        raise ValueError(
            f"{said} whose examples have inputs, targets and mask (bool [L], True "
            f"where a token is real), got {', '.join(example) or 'none of them'}"
        )
    mask, length = np.asarray(example["mask"]), dataset.spec.length
    if mask.dtype.kind != "b" or mask.shape[-1:] != (length,):
        raise ValueError(
            f"{said} whose masks are bool [{length}], as its spec's length says, got "
            f"{mask.dtype} {mask.shape}"
        )


def _narrow(name: str, dataset: Dataset) -> Dataset:
    """A dataset of the user's own whose numbers are those that JAX computes with: no
    cast changes them in silence. Rows in memory are examined now, other examples as
    they come."""
    where = f"data.name: {name}"
    if dataset.finish is not None:
        finish = functools.partial(_finished, finish=dataset.finish, where=where)
        return dataclasses.replace(dataset, finish=finish)
    sources = {}
    for split, source in dataset.sources.items():
        if _in_memory(source):
            narrow = Rows(cast.example(f"{where}: {split}", source.arrays))
        else:
            narrow = Narrow(source, f"{where}: {split}")
        sources[split] = narrow
    return dataclasses.replace(dataset, sources=sources)


def _in_memory(source) -> bool:
    return type(source) is Rows and not any(
        isinstance(array, np.memmap) for array in source.arrays.values()
    )


class Narrow:
    """Random access to the examples of a source, each as `cast.example` makes it."""

    def __init__(self, source, where: str):
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> Example:
        return cast.example(self._where, self._source[index])


def _finished(example: Example, finish: Callable, where: str) -> Example:
    return cast.example(where, finish(example))


def stretched(config: Mapping, times: int) -> Dataset:
    """The dataset of `config` with sequences `times` as long, all else being equal.

    Raises:
        ValueError: a dataset that has no argument "length", or none of that length, or
            one that is told to take all there is.
    """
    name = config["name"]
    valid = inspect.signature(get(name)).parameters
    if "length" not in valid:
        able = [
            name
            for name, make in DATASETS.items()
            if "length" in inspect.signature(make).parameters
        ]
        raise ValueError(
            f"the dataset {name!r} has one length only; data.name must be one of "
            f"{', '.join(sorted(able))} for others"
        )
    length = config.get("length", valid["length"].default)
    if not length:
        raise ValueError(
            "data.length must be a number of frames, or of samples of a recording, to "
            f"be multiplied, got {length}"
        )
    return load({**config, "length": times * length, "buckets": {}})
