"""`build(config.model)`: the only place where a config becomes arguments."""

import dataclasses
import functools
import importlib

import flax.linen as nn

from layers import precision
from layers.attention import Attention
from layers.block import GATES, NORMS, Block
from layers.delta_net import DeltaNet
from layers.dss import DSS
from layers.flash_butterfly import FlashButterfly
from layers.gated_delta_net import GatedDeltaNet
from layers.gla import GLA
from layers.gru import GRU
from layers.h3 import H3
from layers.hyena import Hyena
from layers.lightning import Lightning
from layers.long_conv import LongConv
from layers.lru import LRU
from layers.lstm import LSTM
from layers.mamba import Mamba
from layers.mamba2 import Mamba2
from layers.model import ENCODERS, HEADS, Model
from layers.retention import Retention
from layers.rg_lru import RGLRU
from layers.s4 import S4
from layers.s4d import S4D
from layers.s5 import S5
from layers.sg_conv import SGConv
from layers.stack import Stack

LAYERS = {
    "s4": S4,
    "s4d": S4D,
    "dss": DSS,
    "s5": S5,
    "lru": LRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "rg_lru": RGLRU,
    "retention": Retention,
    "lightning": Lightning,
    "gla": GLA,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "h3": H3,
    "hyena": Hyena,
    "long_conv": LongConv,
    "flash_butterfly": FlashButterfly,
    "sg_conv": SGConv,
    "attention": Attention,
    "lstm": LSTM,
    "gru": GRU,
}

# How the papers place a mixer in its block: the gate behind it, and the hidden width of
# a gated MLP per feature. What is not here, a user's layer too, is placed as S4 is.
BLOCKS = {
    "mamba": ("none", 0.0),
    "mamba2": ("none", 0.0),
    "rg_lru": ("none", 3.0),
    "retention": ("none", 2.0),
    "lightning": ("none", 2.0),
    "gla": ("none", 8 / 3),
    "delta_net": ("none", 8 / 3),
    "gated_delta_net": ("none", 8 / 3),
    "h3": ("none", 4.0),
    "hyena": ("none", 4.0),
    "attention": ("none", 8 / 3),
}
S4_BLOCK = ("glu", 0.0)


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
    `layer_args` holds fields of the layer (for a pattern: of each, by name). Gate ""
    and mlp -1 are those of the layer's family, see `BLOCKS`. Raises `ValueError` naming
    the key, what it was and what it may be.
    """
    _one_of("encoder", config["encoder"], ENCODERS)
    _one_of("head", config["head"], HEADS)
    _one_of("norm", config["norm"], NORMS)
    _one_of("gate", config["gate"], ("", *GATES))
    for key in ("features", "depth", "outputs"):
        if config[key] < 1:
            raise ValueError(f"{key}: must be at least 1, got {config[key]}")
    if config["encoder"] == "token" and config["vocab_size"] < 1:
        raise ValueError(
            f"vocab_size: a token encoder needs at least 1, got {config['vocab_size']}"
        )
    dtype = precision.get(config["dtype"]).compute
    names, args = config["layer"], dict(config["layer_args"])
    if isinstance(names, str):
        names, args = (names,), {names: args}
    pattern = tuple(_block(name, args.get(name, {}), config, dtype) for name in names)
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


def _block(name, args, config, dtype):
    """A factory of the block around one layer of the pattern."""
    gate, mlp = BLOCKS.get(name, S4_BLOCK)
    mlp = mlp if config["mlp"] < 0 else config["mlp"]
    return functools.partial(
        Block,
        mixer=_mixer(name, args, config, dtype),
        features=config["features"],
        norm=config["norm"],
        prenorm=config["prenorm"],
        gate=config["gate"] or gate,
        mlp=round(mlp * config["features"]),
        dropout=config["dropout"],
        tie_dropout=config["tie_dropout"],
        dtype=dtype,
    )


def _mixer(name, args, config, dtype):
    cls = get(name)
    fields = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    given = dict(args)
    unknown = sorted(set(given) - fields)
    if unknown:
        valid = sorted(fields - {"features", "dtype"})
        raise ValueError(
            f"layer_args: {name} has no {unknown}; may be {valid}. A config takes "
            f"layer and arguments together: configs/FILE.py:...,layer={name}"
        )
    given.setdefault("features", config["features"])
    given.setdefault("dtype", dtype)
    for capacity in {"length", "context"} & fields:
        given.setdefault(capacity, config["length"])
    return functools.partial(cls, **given)


def _one_of(key, value, valid):
    if value not in valid:
        raise ValueError(f"{key}: unknown {value!r}; may be {sorted(valid)}")
