"""`build(config.model)`: the only place where a config becomes arguments."""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax.numpy as jnp

from layers.block import GATES, NORMS, Block
from layers.dss import DSS
from layers.gru import GRU
from layers.lru import LRU
from layers.model import ENCODERS, HEADS, Model
from layers.s4 import S4
from layers.s4d import S4D
from layers.s5 import S5
from layers.stack import Stack

LAYERS = {"s4": S4, "s4d": S4D, "dss": DSS, "s5": S5, "lru": LRU, "gru": GRU}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def get(name):
    """The layer class called `name`: a key of `LAYERS`, or the dotted path of the
    user's own ("package.module.Class"). `ValueError` lists the names."""
    if name in LAYERS:
        return LAYERS[name]
    module, _, attribute = name.rpartition(".")
    unknown = ValueError(
        f"layer: unknown {name!r}; may be {sorted(LAYERS)} or the dotted path of a "
        "Flax module"
    )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        # What the user's own module fails to import is the user's to see.
        if isinstance(error, ModuleNotFoundError) and error.name not in (
            module,
            module.partition(".")[0],
        ):
            raise
        raise unknown from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise unknown
    return found


def build(config) -> Model:
    """A `Model` from a mapping such as `configs.common.base().model`.

    `layer` is a name or a sequence of names, the pattern that `depth` blocks repeat;
    `layer_args` holds fields of the layer (for a pattern: of each, by name). Raises
    `ValueError` naming the key, what it was and what it may be.
    """
    _one_of("encoder", config["encoder"], ENCODERS)
    _one_of("head", config["head"], HEADS)
    _one_of("norm", config["norm"], NORMS)
    _one_of("gate", config["gate"], GATES)
    _one_of("dtype", config["dtype"], DTYPES)
    for key in ("features", "depth", "outputs"):
        if config[key] < 1:
            raise ValueError(f"{key}: must be at least 1, got {config[key]}")
    if config["encoder"] == "token" and config["vocab_size"] < 1:
        raise ValueError(
            f"vocab_size: a token encoder needs at least 1, got {config['vocab_size']}"
        )
    dtype = DTYPES[config["dtype"]]
    pattern = tuple(
        functools.partial(
            Block,
            mixer=mixer,
            features=config["features"],
            norm=config["norm"],
            prenorm=config["prenorm"],
            gate=config["gate"],
            dropout=config["dropout"],
            tie_dropout=config["tie_dropout"],
            dtype=dtype,
        )
        for mixer in _mixers(config, dtype)
    )
    return Model(
        stack=functools.partial(
            Stack, pattern=pattern, depth=config["depth"], remat=config["remat"]
        ),
        features=config["features"],
        outputs=config["outputs"],
        encoder=config["encoder"],
        vocab_size=config["vocab_size"],
        head=config["head"],
        norm=config["norm"] if config["prenorm"] else "",
        dtype=dtype,
    )


def _mixers(config, dtype):
    """A factory per position of the pattern."""
    names, args = config["layer"], dict(config["layer_args"])
    if isinstance(names, str):
        names, args = (names,), {names: args}
    for name in names:
        cls = get(name)
        fields = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
        given = dict(args.get(name, {}))
        unknown = sorted(set(given) - fields)
        if unknown:
            valid = sorted(fields - {"features", "dtype"})
            raise ValueError(
                f"layer_args: {name} has no {unknown}; may be {valid}. A config takes "
                f"layer and arguments together: configs/FILE.py:...,layer={name}"
            )
        given.setdefault("features", config["features"])
        given.setdefault("dtype", dtype)
        if "length" in fields:
            given.setdefault("length", config["length"])
        yield functools.partial(cls, **given)


def _one_of(key, value, valid):
    if value not in valid:
        raise ValueError(f"{key}: unknown {value!r}; may be {sorted(valid)}")
