"""`build(config.model)`: the only place where a config becomes arguments."""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn

from layers import contract
from layers.attention import Attention
from layers.delta_net import DeltaNet
from layers.dss import DSS
from layers.facts import placement_of
from layers.flash_butterfly import FlashButterfly
from layers.frames.conv_lstm import ConvLSTM
from layers.frames.conv_s5 import ConvS5
from layers.frames.frame_attention import FrameAttention, FullFrameAttention
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
from layers.min_gru import MinGRU
from layers.models import grid, precision
from layers.models.block import GATES, GELUS, NORMS, Block
from layers.models.model import ENCODERS, HEADS, Model
from layers.models.stack import KEEPS, Stack
from layers.models.video import Video
from layers.models.vq import VQ
from layers.retention import Retention
from layers.rg_lru import RGLRU
from layers.s4 import S4
from layers.s4d import S4D
from layers.s5 import S5
from layers.sg_conv import SGConv

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
    "min_gru": MinGRU,
}

# Layers over frames [B, L, h, w, U], with a field `size`.
FRAME_LAYERS = {
    "conv_s5": ConvS5,
    "conv_lstm": ConvLSTM,
    "frame_attention": FrameAttention,
    "full_frame_attention": FullFrameAttention,
}


def get(name: str) -> type[nn.Module]:
    """The layer class called `name`: a key of `LAYERS` or `FRAME_LAYERS`, or the dotted
    path of the user's own ("package.module.Class"). `ValueError` lists the names, or
    says where Python looked and what the class lacks, see `layers.contract`."""
    known = LAYERS | FRAME_LAYERS
    if name in known:
        return known[name]
    parts = name.split(".")
    if len(parts) < 2 or not all(map(str.isidentifier, parts)):
        raise ValueError(
            f"layer: must be one of {sorted(known)} or the dotted path of a Flax "
            f"module, got {name!r}"
        )
    return contract.imported(name)


def build(config: Mapping) -> Model | Video | VQ:
    """A `Model` from a mapping such as `configs.common.base().model`.

    `layer` is a name or a sequence of names, the pattern that `depth` blocks repeat;
    `layer_args` holds fields of the layer (for a pattern: of each, by name, of a class
    of the user's own without its module). Gate "",
    mlp -1, gelu "" and norm_epsilon -1 are those of the layer's family, its
    `PLACEMENT` (see `layers.facts`); norm_epsilon 0 is the norm's own. Raises
    `ValueError` naming the key, what it was and what it must be.

    `grid`, a key of `layers.models.grid.SCHEMES`, goes with the encoder "grid" and
    makes every layer a `Grid`; `patch` is the encoder's.

    The encoder "video" makes a `Video` of layers over frames, whose fields are
    `config["video"]`.

    The layer "vq" is a model of its own, the autoencoder `VQ` of frames with `outputs`
    channels: it has no blocks.
    """
    if config["layer"] == "vq":
        return _autoencoder(config)
    _one_of("encoder", config["encoder"], (*ENCODERS, Video.encoder))
    _one_of("head", config["head"], HEADS)
    _one_of("norm", config["norm"], NORMS)
    _one_of("gate", config["gate"], ("", *GATES))
    _one_of("gelu", config["gelu"], ("", *GELUS))
    _one_of("remat_keeps", config["remat_keeps"], KEEPS)
    if not (config["norm_epsilon"] == -1 or 0 <= config["norm_epsilon"] < 1):
        raise ValueError(
            "norm_epsilon: must lie in [0, 1), or be -1 for that of the layer's "
            f"family, got {config['norm_epsilon']}"
        )
    for key in ("features", "depth", "outputs"):
        if config[key] < 1:
            raise ValueError(f"{key}: must be at least 1, got {config[key]}")
    if config["encoder"] == "token" and config["vocab_size"] < 1:
        raise ValueError(
            "vocab_size: must be at least 1 with the encoder 'token', got "
            f"{config['vocab_size']}"
        )
    _check_grid(config)
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout: must be in [0, 1), got {config['dropout']}")
    dtype = precision.get(config["dtype"]).compute
    names, args = _pattern(config)
    pattern = tuple(_block(name, args.get(name, {}), config, dtype) for name in names)
    last = pattern[(config["depth"] - 1) % len(pattern)]
    stack = functools.partial(
        Stack,
        pattern=pattern,
        depth=config["depth"],
        remat=config["remat"],
        keeps=config["remat_keeps"],
    )
    if config["encoder"] == Video.encoder:
        return _video(stack, config, dtype)
    return Model(
        stack=stack,
        features=config["features"],
        outputs=config["outputs"],
        encoder=config["encoder"],
        vocab_size=config["vocab_size"],
        patch=config["patch"],
        head=config["head"],
        norm=config["norm"] if config["prenorm"] else "",
        norm_epsilon=last.keywords["norm_epsilon"],
        dtype=dtype,
    )


def foreign(config: Mapping) -> list[str]:
    """The layers of a model's config that are not of this project: `build` imports what
    they name, so that a config from elsewhere is to be asked first."""
    names = config["layer"]
    names = [names] if isinstance(names, str) else names
    return [name for name in names if name not in LAYERS | FRAME_LAYERS | {"vq": VQ}]


def _pattern(config):
    """The names of the layers, and the fields of each by name."""
    names, args = config["layer"], dict(config["layer_args"])
    if isinstance(names, str):
        return (names,), {names: args}
    if not names:
        raise ValueError("layer: a pattern must have at least one name, got none")
    keys = [args_key(name) for name in names]
    unknown = sorted(set(args) - {*keys, *names})
    if unknown:
        raise ValueError(
            "layer_args: must stand under the names of the pattern's layers, "
            f"{sorted(set(keys))}, got {unknown}"
        )
    fields = {name: args.get(name, args.get(args_key(name), {})) for name in names}
    return tuple(names), fields


def args_key(name: str) -> str:
    """Where in `layer_args` of a pattern the fields of the layer `name` stand: a key
    has no dots, so those of the user's own class are under its name alone."""
    return name.rpartition(".")[2]


def _block(name, args, config, dtype):
    """A factory of the block around one layer of the pattern."""
    placement = placement_of(get(name))
    mlp = placement.mlp if config["mlp"] < 0 else config["mlp"]
    epsilon = config["norm_epsilon"]
    return functools.partial(
        Block,
        mixer=_mixer(name, args, config, dtype),
        features=config["features"],
        norm=config["norm"],
        prenorm=config["prenorm"],
        gate=config["gate"] or placement.gate,
        gelu=config["gelu"] or placement.gelu,
        mlp=round(mlp * config["features"]),
        dropout=config["dropout"],
        tie_dropout=config["tie_dropout"],
        norm_epsilon=placement.norm_epsilon if epsilon < 0 else epsilon,
        dtype=dtype,
    )


def _video(stack, config, dtype):
    options = dict(config["video"])
    depths = tuple(options["depths"])
    if not depths or min(depths) < 1:
        raise ValueError(f"video.depths: must be widths of at least 1, got {depths}")
    return Video(
        stack=stack,
        features=config["features"],
        size=tuple(options["size"]),
        channels=options["channels"],
        depths=depths,
        vocab_size=config["vocab_size"],
        actions=options["actions"],
        action_features=options["action_features"],
        remat=config["remat"],
        dtype=dtype,
    )


def _latent_size(config):
    """(h, w) of the frames between encoder and decoder."""
    size, depths = tuple(config["video"]["size"]), config["video"]["depths"]
    factor = 2 ** (len(depths) - 1)
    if len(size) != 2 or any(n < 1 or n % factor for n in size):
        raise ValueError(
            f"video.size: must be (h, w), multiples of {factor} with {len(depths)} "
            f"depths, got {size}"
        )
    return tuple(n // factor for n in size)


def _autoencoder(config):
    arguments = dict(config["layer_args"])
    _fields(VQ, "vq", arguments, {"channels", "dtype"})
    if "depths" in arguments:  # a config read back from its file has lists
        arguments["depths"] = tuple(arguments["depths"])
    arguments.setdefault("channels", config["outputs"])
    arguments.setdefault("dtype", precision.get(config["dtype"]).compute)
    return VQ(**arguments)


def _fields(cls, name, arguments, reserved):
    """The fields of a layer; `ValueError` where `arguments` has others. Those of
    `reserved` are not a config's to give."""
    fields = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    unknown = sorted(set(arguments) - fields)
    if unknown:
        raise ValueError(
            f"layer_args: must be among {sorted(fields - reserved)} for {name}, got "
            f"{unknown}. A config takes layer and arguments together: "
            f"configs/FILE.py:...,layer={name}"
        )
    return fields


def _mixer(name, args, config, dtype):
    cls, given = get(name), dict(args)
    fields = _fields(cls, name, given, {"features", "dtype", "size"})
    read = "frames" if config["encoder"] == Video.encoder else "tokens"
    if ("size" in fields) != (read == "frames"):
        raise ValueError(
            f"layer: must read {read} with the encoder {config['encoder']!r}, got "
            f"{name!r}; layers over frames are {sorted(FRAME_LAYERS)}, for "
            "configs/video.py, all others read tokens"
        )
    given.setdefault("features", config["features"])
    given.setdefault("dtype", dtype)
    if "size" in fields:
        given["size"] = _latent_size(config)
    for capacity in {"length", "context"} & fields:
        given.setdefault(capacity, config["length"])
    if name not in LAYERS | FRAME_LAYERS:
        given = _proved(name, cls, given)
    mixer = functools.partial(cls, **given)
    if not config["grid"]:
        return mixer
    return functools.partial(
        grid.Grid,
        mixer=mixer,
        features=config["features"],
        scheme=config["grid"],
        dtype=dtype,
    )


def _proved(name, cls, given):
    """The fields of a layer of the user's own, of which nothing else is known."""
    contract.check_fields("layer_args", name, cls, given, {"features", "dtype", "size"})
    # a config read back from its file has lists
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    contract.check_call(cls(**given), name)
    contract.check_init_state(cls(**given), name)
    return given


def _check_grid(config):
    scheme, encoder = config["grid"], config["encoder"]
    _one_of("grid", scheme, ("", *grid.SCHEMES))
    if scheme and encoder != "grid":
        raise ValueError(
            f"grid: must be '' without the encoder 'grid', got {scheme!r} and the "
            f"encoder {encoder!r}; datasets of images give that with data.layout=image"
        )
    if encoder == "grid" and not scheme:
        raise ValueError(
            f"grid: must be one of {sorted(grid.SCHEMES)} with the encoder 'grid', got "
            "''"
        )
    patch = config["patch"]
    if patch < 1 or (patch > 1 and not scheme):
        raise ValueError(
            f"patch: must be at least 1, and 1 without a grid, got {patch}"
        )


def _one_of(key, value, valid):
    if value not in valid:
        raise ValueError(f"{key}: must be one of {sorted(valid)}, got {value!r}")
