"""What a dataset is, as JSON and back: what a run keeps to be read without its data.

What is read may come from anyone: a value that cannot be is a `ValueError` that names
the file and the key.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kernels import tolerance
from layers.models import model
from train import settings
from train.data.pipeline import Dataset
from train.data.sources import SPLITS
from train.data.spec import Spec
from train.losses import LOSSES

# The least that a whole number of a spec may be, 0 where nothing is said.
LEAST = {"length": 1, "outputs": 1, "channels": 1, "size": 1}
KINDS = typing.get_type_hints(Spec)
REQUIRED = [
    field.name
    for field in dataclasses.fields(Spec)
    if field.default is dataclasses.MISSING
]
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def described(dataset: Dataset) -> dict:
    """The spec of a dataset and how many examples each split has, as JSON knows it."""
    counts = {split: dataset.num_examples(split) for split in dataset.sources}
    return {"spec": _as_json(dataset.spec), "examples": counts}


def _as_json(spec: Spec) -> dict:
    """A spec as JSON knows it, whichever numbers and sequences it was made of."""
    text = json.dumps(dataclasses.asdict(spec), default=np.generic.item)
    return json.loads(text)


def spec_of(path: Path, content: Mapping) -> Spec:
    """The spec that `described` has put into what the file `path` holds. A key that it
    lacks has its default: the file is older than the key.

    Raises:
        ValueError: keys that are not known, values that cannot be.
    """
    _check_keys(path, "", content, ("spec", "examples", "said"), ("spec", "examples"))
    for key in content:
        if not isinstance(content[key], dict):
            raise ValueError(
                f"{path}: {key} must be an object, got {content[key]!r:.60}"
            )
    _check_keys(path, "spec.", content["spec"], KINDS, REQUIRED)
    _check_keys(path, "examples.", content["examples"], SPLITS, ())
    for split, count in content["examples"].items():
        if type(count) is not int or count < 0:
            raise ValueError(
                f"{path}: examples.{split} must be a whole number, got {count!r:.60}"
            )
    values = {key: _value(path, key, x) for key, x in content["spec"].items()}
    spec = Spec(**values)
    _check_sizes(path, spec)
    return spec


def differing(original: Spec, now: Spec) -> str:
    """What of data that are there now is another than it was, in words, or "". A rate
    of 0 is one that was not kept."""
    changes, then, there = [], _as_json(original), _as_json(now)
    for key, before in then.items():
        after = there[key]
        if key == "rate" and not before:
            continue
        if KINDS[key] == tuple[float, ...] and len(before) == len(after) > 0:
            # Sums over the same numbers differ a little between machines.
            same = tolerance.error(after, before) <= tolerance.limit("float32")
        else:
            same = before == after
        if not same:
            changes.append(f"{key} was {before!r:.60}, is {after!r:.60}")
    return "; ".join(changes)


def _check_keys(path: Path, prefix: str, content: Mapping, known, required) -> None:
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ValueError(
            f"{path}: {prefix}{unknown[0]:.60} is no known key; those are "
            f"{', '.join(known)}"
        )
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{path}: {prefix}{missing[0]} is missing")


def _value(path: Path, key: str, value):
    """A field of the spec, of its type; a list as a tuple."""
    kind = KINDS[key]
    if typing.get_origin(kind) is not tuple:
        return _plain(path, key, key, value, kind)
    if not isinstance(value, list):
        raise ValueError(f"{path}: spec.{key} must be a list, got {value!r:.60}")
    kind, _ = typing.get_args(kind)
    return tuple(_plain(path, key, f"{key}[{i}]", x, kind) for i, x in enumerate(value))


def _plain(path: Path, key: str, place: str, value, kind: type):
    integer = type(value) is int
    if kind is float and integer and abs(value) <= settings.MOST:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{path}: spec.{place} must be {NAMES[kind]}, got {value!r:.60}"
        )
    if kind is int and not LEAST.get(key, 0) <= value <= settings.MOST:
        raise ValueError(
            f"{path}: spec.{place} must lie between {LEAST.get(key, 0)} and "
            f"{settings.MOST}, got {value!r:.60}"
        )
    if kind is float and not abs(value) <= settings.LARGEST:
        raise ValueError(
            f"{path}: spec.{place} must be finite and fit float32, got {value!r:.60}"
        )
    return value


def _check_sizes(path: Path, spec: Spec) -> None:
    """Raises a `ValueError` for fields that contradict one another."""
    for key, valid in (
        ("encoder", (*model.ENCODERS, "video")),
        ("loss", tuple(LOSSES)),
    ):
        value = getattr(spec, key)
        if value not in valid:
            raise ValueError(
                f"{path}: spec.{key} must be one of {', '.join(valid)}, got "
                f"{value!r:.60}"
            )
    if spec.encoder == "token" and not spec.vocab_size:
        raise ValueError(f"{path}: spec.vocab_size must be 1 or more for tokens, got 0")
    for key, size, what in (
        ("classes", spec.outputs, "outputs"),
        ("mean", spec.channels, "channels"),
        ("std", spec.channels, "channels"),
        ("symbols", spec.vocab_size, "vocab_size"),
    ):
        count = len(getattr(spec, key))
        if count not in (0, size):
            raise ValueError(
                f"{path}: spec.{key} must have {size} items, as many as "
                f"spec.{what}, or none, got {count}"
            )
    if len(spec.mean) != len(spec.std):
        raise ValueError(
            f"{path}: spec.mean and spec.std must have as many items, got "
            f"{len(spec.mean)} and {len(spec.std)}"
        )
    if len({*spec.classes}) < len(spec.classes):
        raise ValueError(f"{path}: spec.classes must name every class once")
    if any(not (x > 0 and math.isfinite(1 / x)) for x in spec.std):
        raise ValueError(f"{path}: spec.std must be above 0, got {[*spec.std]!r:.60}")
