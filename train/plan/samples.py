"""The arrays of a batch, by their shapes: of data that need not be here."""

from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from train import data
from train.data.spec import Spec

Shapes = dict[str, "jax.ShapeDtypeStruct | Shapes"]


def of(config: ConfigDict) -> tuple[Spec, Shapes]:
    """The spec of a config's data, and its batches of one example. No file is read
    where the config alone says what there is.

    Raises:
        ValueError: what `data.load` raises, such as a file that is missing where only
            that says what its sequences are.
    """
    spec = data.known(config.data)
    if spec is not None:
        return spec, of_spec(spec)
    dataset = data.load(config.data)
    batch = dataset.samples(1, config.seed)[0]
    return dataset.spec, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch
    )


def of_spec(spec: Spec) -> Shapes:
    """A batch of one example of data that a spec describes. Sequences of one channel
    have no axis for it, and nothing has "reset" or "dt"."""
    length, size = spec.length, tuple(spec.size)
    shapes = {
        "token": ((length,), np.int32),
        "scalar": ((length, spec.channels)[: 1 + (spec.channels > 1)], np.float32),
        "image": ((*size, spec.channels), np.float32),
        "video": ((length, *size, spec.channels), np.uint8),
    }
    shapes["grid"] = shapes["image"]
    if spec.encoder == "video" and spec.vocab_size:  # codes
        shapes["video"] = ((length, *size), np.int32)
    inputs = shapes[spec.encoder]
    targets = {
        "classification": ((), np.int32),
        "token": ((length,), np.int32),
        "regression": ((spec.outputs,), np.float32),
        "absolute": ((length, spec.outputs), np.float32),
    }.get(spec.loss, inputs)
    batch = {
        "inputs": _one(*inputs),
        "targets": _one(*targets),
        "mask": _one((length,), np.bool_),
    }
    if spec.actions:
        batch["inputs"] = {
            "frames": batch["inputs"],
            "actions": _one((length,), np.int32),
        }
    return batch


def _one(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), np.dtype(dtype))


def batch(
    one: Mapping, rows: int, place: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `rows` examples that lies as `place` says."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place),
        dict(one),
    )
