"""What the values of a config may be, whoever wrote it: a command line, a file, a run.

A config's own ranges are checked where a key is used; here are the types, and the sizes
that any number must have to be one for JAX and NumPy.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import common

SEEDS = 2**32  # of JAX, which takes others modulo this, and of scikit-learn
MOST = 2**31 - 1  # int32
LARGEST = float(np.finfo(np.float32).max)
# The least that a number may be where no one else asks: what is said only once it is
# used would be said after compiling, or never.
LEAST = {
    "model.length": 0,
    "model.vocab_size": 0,
    "model.outputs": 0,
    "model.video.channels": 0,
    "model.video.actions": 0,
    "model.video.action_features": 1,
    "pretrain.steps": 0,
    "pretrain.lr": 0,
    "pretrain.batch_size": 0,
    "rollout.context": 0,
    "rollout.horizon": 0,
    "rollout.clips": 0,
    "train.chunk": 0,
    "train.eval_batch_size": 0,
    "train.save_timeout": 0,
    "train.skip_nonfinite": 0,
}
# The same for the fields of layers, whichever has them.
LEAST_FIELD = {"heads": 1, "state_size": 1, "base": 1}
MOST_FIELD = {"expand": 10_000, "expand_k": 10_000, "expand_v": 10_000}
NAMES = {bool: "True or False", str: "a text", int: "a whole number", float: "a number"}


def check_types(config: Mapping) -> None:
    """Raises a `ValueError` for a value of another type than `configs.common.base` and
    `configs.common.LAYER_ARGS` have there, or for a number that is none for a computer.

    Keys that are missing, or that those do not have, are left to whoever reads them;
    so is "data", whose keys are arguments of the dataset.
    """
    defaults = common.base().to_dict()
    for key in ("data", "groups"):
        del defaults[key]
    for key in ("layer", "layer_args"):
        del defaults["model"][key]
    _check_tree("", config, defaults)
    if "seed" in config:
        check_seed("seed", config["seed"])
    for key in ("model", "data", "groups"):
        if key not in config:
            raise ValueError(f"{key} is missing; configs.common.base() has it")
    check("data", config["data"], {})
    _check_groups(config["groups"])
    _check_model(config["model"])


def _check_model(model: Mapping) -> None:
    width = model.get("mlp", 0) * model.get("features", 1)
    if width > MOST:
        raise ValueError(
            f"model.mlp must be at most {MOST} / model.features, got {model['mlp']}"
        )
    names = model.get("layer", "")
    if not _is_text(names) and not (_is_sequence(names) and all(map(_is_text, names))):
        raise ValueError(
            f"model.layer must be a name, or a sequence of names, got {_shown(names)}"
        )
    args = model.get("layer_args", {})
    check("model.layer_args", args, {})
    if _is_text(names):
        _check_fields("model.layer_args.", args, names)
        return
    for name, fields in args.items():
        check(f"model.layer_args.{name}", fields, {})
        _check_fields(f"model.layer_args.{name}.", fields, name)


def _check_fields(path: str, values: Mapping, layer: str) -> None:
    defaults = common.LAYER_ARGS.get(layer, {})  # those of others are not known
    _check_tree(path, values, defaults)
    for name in (name for name in defaults if name in values):
        value, lower, upper = values[name], LEAST_FIELD.get(name), MOST_FIELD.get(name)
        if lower is not None and value < lower:
            raise ValueError(f"{path}{name} must be {lower} or more, got {value}")
        if upper is not None and value > upper:
            raise ValueError(
                f"{path}{name} must be {upper} or less, got {_shown(value)}"
            )


def _check_tree(path: str, values: Mapping, defaults: Mapping) -> None:
    for key, default in defaults.items():
        if key not in values:
            continue
        check(path + key, values[key], default)
        lower = LEAST.get(path + key)
        if lower is not None and values[key] < lower:
            raise ValueError(f"{path}{key} must be {lower} or more, got {values[key]}")
        if _is_mapping(default):
            _check_tree(f"{path}{key}.", values[key], default)


def check_options(key: str, given: Mapping, defaults: Mapping) -> None:
    """Raises a `ValueError` for a key of `given`, which `key` names, that is none of
    `defaults`, or whose value is of another type than there."""
    check(key, given, {})
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"{key} has no {name!r}; it has {', '.join(defaults)}")
        check(f"{key}.{name}", value, defaults[name])


def check(key: str, value, default) -> None:
    """Raises a `ValueError` unless `value`, that of `key`, is of the type of `default`.

    A number must be finite, or the default itself (an infinite limit), and fit int32 or
    float32; seeds are counted apart, see `check_seed`. A whole number is a number too.
    The items of a sequence are like the default's, if that has any.
    """
    if _is_mapping(default):
        if not _is_mapping(value):
            raise ValueError(f"{key} must be a mapping of keys, got {_shown(value)}")
    elif _is_sequence(default):
        if not _is_sequence(value):
            raise ValueError(f"{key} must be a sequence, got {_shown(value)}")
        for i, item in enumerate(value if default else ()):
            check(f"{key}[{i}]", item, default[min(i, len(default) - 1)])
    else:
        _check_plain(key, value, default)


def _check_plain(key: str, value, default) -> None:
    kind = type(default)
    types = {
        bool: (bool, np.bool_),
        int: (int, np.integer),
        float: (int, np.integer, float, np.floating),
    }.get(kind, kind)
    is_flag = isinstance(value, (bool, np.bool_)) and kind is not bool
    if is_flag or not isinstance(value, types):
        raise ValueError(
            f"{key} must be {NAMES.get(kind, kind.__name__)}, got {_shown(value)}"
        )
    if kind is int and key.rpartition(".")[2] != "seed" and abs(value) > MOST:
        raise ValueError(f"{key} must be at most {MOST}, got {_shown(value)}")
    if kind is float and value != default and not abs(value) <= LARGEST:
        raise ValueError(
            f"{key} must be finite and fit float32 (up to {LARGEST:.3g}), got "
            f"{_shown(value)}"
        )


def place(key: str, text: str | Path) -> Path:
    """The path that a user wrote, "~" being the home; `ValueError` for one that no file
    system here can have."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"{key} must be a path that can be, got {_shown(str(text))} ({reason})"
        ) from None
    return path


def check_memory(key: str, count: int, purpose: str) -> None:
    """Raises a `ValueError` that names `key` where `count` bytes for `purpose` are more
    than this machine has."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count > available:
        raise ValueError(
            f"{key} must be smaller: {purpose} would take {count / 1e9:,.1f} GB of "
            f"memory, and this machine has {available / 1e9:,.1f} GB"
        )


def check_seed(key: str, value: int) -> None:
    """Raises a `ValueError` for a seed outside [0, 2^32): JAX would take it for another
    one that is inside."""
    if value < 0:
        raise ValueError(f"{key} must be 0 or more, got {_shown(value)}")
    if value >= SEEDS:
        raise ValueError(f"{key} must be below 2^32 = {SEEDS}, got {_shown(value)}")


def _check_groups(groups) -> None:
    if not _is_sequence(groups):
        raise ValueError(f"groups must be a sequence of pairs, got {_shown(groups)}")
    for i, group in enumerate(groups):
        pair = _is_sequence(group) and len(group) == 2
        if not (pair and _is_text(group[0]) and _is_mapping(group[1])):
            raise ValueError(
                f"groups[{i}] must be a pair of a pattern and its factors, such as "
                f"('.*', {{'lr': 1.0}}), got {_shown(group)}"
            )
        defaults = {"lr": 1.0, "wd": 1.0, "optional": False}
        _check_tree(f"groups[{i}].", group[1], defaults)


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_mapping(value) -> bool:
    return isinstance(value, (Mapping, ConfigDict))


def _is_sequence(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shown(value) -> str:
    """A value in a message; a number of a thousand digits is cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        digits = value.bit_length() * math.log10(2)
        if digits > 100:  # Python itself refuses to write some thousand digits
            return f"a number of {int(digits)} digits"
    text = " ".join(repr(value).split())  # some have lines
    return text if len(text) <= 80 else f"{text[:80]}..."
