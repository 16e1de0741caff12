"""What a run trains and a checkpoint holds."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import Mesh

from train import sharding

COLLECTIONS = ("params", "batch_stats", "buffers")


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: int32 [], updates made so far.
        params, batch_stats, buffers: collections of the model ({} where it has none).
        opt_state: what the optimizer remembers between steps.
        ema: the averaged params, or None where `train.ema` is 0.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    buffers: Any
    opt_state: Any
    ema: Any

    def variables(self) -> dict[str, Any]:
        """What evaluation applies the model with: the averaged weights if there are."""
        params = self.params if self.ema is None else self.ema
        return {"params": params} | self.collections()

    def collections(self) -> dict[str, Any]:
        """The model's collections that are not trained, without the empty ones."""
        rest = {"batch_stats": self.batch_stats, "buffers": self.buffers}
        return {name: value for name, value in rest.items() if value}


def init_variables(model: nn.Module, batch: Mapping, key: jax.Array) -> dict[str, Any]:
    """The model's first variables, without the boxes of logical axis names.

    Args:
        model: obeys the contract of `layers.models.build.build`.
        batch: a batch, of whose "inputs" only shape and dtype matter.
        key: random key that the parameters are drawn with.

    Raises:
        ValueError: a collection that TrainState does not know.
    """
    return meta.unbox(_boxed(model, batch, key))


def _boxed(model, batch, key):
    zeros = jax.tree.map(
        lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch["inputs"]
    )
    variables = model.init({"params": key}, zeros)
    unknown = sorted(set(variables) - set(COLLECTIONS))
    if unknown:
        raise ValueError(
            f"the model's collections must be among {', '.join(COLLECTIONS)}, "
            f"got {', '.join(unknown)}"
        )
    return variables


def param_boxes(model: nn.Module, batch: Mapping):
    """The tree of the shapes of the parameters in their boxes, which say what each
    learns like (`layers.parameters.Alike`); computes nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: _boxed(model, batch, key), key)["params"]


def param_shapes(model: nn.Module, batch: Mapping):
    """The tree of the shapes of the parameters; computes nothing."""
    return meta.unbox(param_boxes(model, batch))


def creator(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    sample_batch: Mapping,
    seed: int,
    mesh: Mesh,
    ema: bool = False,
) -> Callable[[], TrainState]:
    """() -> the state at step 0, every part of it created where it will live: by the
    rules of `train.sharding` for the names of its axes, never whole on one device."""

    def init():
        variables = _boxed(model, sample_batch, jax.random.key(seed))
        params = variables["params"]  # boxed, and so is what the optimizer makes of it
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            buffers=variables.get("buffers", {}),
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    places = sharding.of_tree(jax.eval_shape(init), mesh)
    return jax.jit(lambda: meta.unbox(init()), out_shardings=places)


def create(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    sample_batch: Mapping,
    seed: int,
    mesh: Mesh,
    ema: bool = False,
) -> TrainState:
    """What `creator` creates."""
    return creator(model, optimizer, sample_batch, seed, mesh, ema)()


def abstract(create: Callable[[], TrainState]) -> TrainState:
    """Shapes, dtypes and shardings of what a `creator` creates: the target of a
    restore. Computes nothing."""
    return jax.eval_shape(create)


def named_leaves(tree) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, the path as "params/encoder/kernel"."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
