"""A config as its data complete it, and what of it cannot be."""

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from layers.facts import has_state, why_no_state
from layers.models import grid
from train import optimizers, sharding, stream
from train.data.spec import Spec


def complete(config: ConfigDict, spec: Spec, warmup: int | None = None) -> ConfigDict:
    """A copy of `config` in which the dataset fills in what the model leaves open, and
    a recipe's warmup is a number of steps: `warmup`, where the run has begun with it.

    Images stay a grid where the model has one: `length` is then that of the longest
    sequence a layer reads on it.

    Raises:
        ValueError: fewer outputs or a smaller vocabulary than the dataset has; frames
            or actions of a video that are not the dataset's.
    """
    config = config.copy_and_resolve_references()
    for key in ("vocab_size", "outputs"):
        value, lower = config.model[key], getattr(spec, key)
        if value and value < lower:
            raise ValueError(
                f"model.{key} must be {lower} or more, what the dataset has, or 0 for "
                f"that; got {value}"
            )
    if config.model.grid and spec.encoder == "image":
        size = [n // max(1, config.model.patch) for n in spec.size]
        length = grid.longest(config.model.grid, size)
        spec = spec.but(encoder="grid", length=length)
    for key in ("encoder", "length", "vocab_size", "outputs"):
        if not config.model[key]:
            config.model[key] = getattr(spec, key)
    if spec.encoder == "video":
        _resolve_video(config.model.video, spec)
    optimizers.settle_warmup(config, warmup)
    return config


def _resolve_video(options: ConfigDict, spec: Spec) -> None:
    for key in ("size", "channels", "actions"):
        value, expected = options[key], getattr(spec, key)
        if np.any(value) and tuple(np.ravel(value)) != tuple(np.ravel(expected)):
            raise ValueError(
                f"model.video.{key} must be {expected}, what the dataset has, or 0 for "
                f"that; got {value}"
            )
        options[key] = expected


def check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises a `ValueError` for numbers that are not positive or cannot be divided."""
    options = config.train
    if config.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {config.seed}")
    positive = ("steps", "eval_every", "log_every", "checkpoint_every", "keep")
    for key in (*positive, "accumulate"):
        if options[key] < 1:
            raise ValueError(f"train.{key} must be 1 or more, got {options[key]}")
    if not 0 <= options.ema < 1:
        raise ValueError(f"train.ema must lie in [0, 1), got {options.ema}")
    sharding.check_batch_size(
        "train.batch_size", options.batch_size, mesh, options.accumulate
    )
    if options.eval_batch_size:
        sharding.check_batch_size(
            "train.eval_batch_size", options.eval_batch_size, mesh
        )


def check_chunk(config: ConfigDict, model: nn.Module, inputs: jax.Array) -> None:
    """Raises a `ValueError` where `train.chunk` cannot cut the `inputs` [B, L, ...] of
    a batch, or their shape, into pieces that the model learns from."""
    chunk, devices = config.train.chunk, config.mesh.sequence
    if not chunk:
        return
    stream.check("train.chunk", chunk, model)
    if model.head != "token":
        raise ValueError(
            "train.chunk must be 0 unless model.head is token, got "
            f"{chunk} and {model.head!r}: only the last piece of a sequence would learn"
        )
    length = inputs.shape[1]
    if length % chunk:
        raise ValueError(
            f"train.chunk must divide the length of the sequences, {length}, got "
            f"{chunk}"
        )
    if chunk % devices:
        raise ValueError(
            f"train.chunk must be a multiple of mesh.sequence = {devices}, got {chunk}"
        )


def check_causal(model: nn.Module) -> None:
    """Raises a `ValueError` for a model that would read its targets from later inputs:
    one that has no recurrent mode."""
    if not has_state(model):
        raise ValueError(
            "model.layer must not read the future, where these data have the targets: "
            f"{why_no_state(model)}"
        )
