"""Losses as sums and weights, so that batches of any size and padding can be added up.

`make(spec)` returns `loss_fn(outputs, batch) -> (loss_sum, weight, metric_sums)`; the
mean loss and the mean metrics over batches are the ratios of the totals to the total
weight. Everything is computed in float32, whatever the dtype of the outputs.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from layers.frames.images import from_bytes

LossFn = Callable[
    [jax.Array, Mapping[str, jax.Array]],
    tuple[jax.Array, jax.Array, dict[str, jax.Array]],
]

IGNORED = -1  # a target that is not to be predicted


def make(loss: str, label_smoothing: float = 0.0) -> LossFn:
    """The loss of this name.

    - "classification": -log softmax(outputs)[targets], outputs [B, K], targets int
      [B]; a row whose mask is all False has no weight. Metric: accuracy.
    - "token": the same per token, outputs [B, L, K], targets int [B, L]; a token has a
      weight where its mask is True and its target is not -1. Metrics: accuracy, and
      sequence_accuracy, the share of tokens in whose sequence all are right: of
      sequences, where each has as many that count.
    - "regression": mean over the K outputs of (outputs - targets)^2. Per sequence,
      outputs [B, K], targets [B, K] or [B]; or per real token, outputs [B, L, K],
      targets [B, L, K] or [B, L]. Metric: absolute_error.
    - "absolute": per real token, outputs [B, L, K], targets [B, L, K]: the mean over K
      of |outputs - targets|; a token whose targets are not finite has no weight.
      Metric: absolute_error, the same.
    - "frames": per real frame, outputs [B, L, h, w, C], targets uint8 p as
      x = p / 127.5 - 1: the mean over the frame of (outputs - x)^2 / 2 +
      |outputs - x| / 2. Metrics: mse, the first mean alone.
    - "codes": the classification of every place, outputs [B, L, h, w, K], targets int
      [B, L, h, w], mean over the frame. Metric: accuracy.
    - "autoencoder": per real frame of the inputs, uint8 p as x = p / 127.5 - 1, with
      outputs a `layers.models.vq.Reconstruction`: mean of (frames - x)^2 / 2 +
      |frames - x| / 2, plus its commitment. Metrics: mse, commitment; perplexity, exp
      of the entropy of how often the batch has each code; usage, the share of codes
      that it has at all.

    Args:
        loss: a key of LOSSES, such as the spec of a dataset names.
        label_smoothing: share e of the probability that goes to all K classes alike:
            the loss becomes (1 - e) * loss + e * mean_k(-log softmax(outputs)[k]).

    Raises:
        ValueError: an unknown loss, a label_smoothing outside [0, 1) or not 0 where
            nothing is classified; and by the loss itself, for outputs and targets that
            do not fit.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    sums = LOSSES[loss].sums
    if LOSSES[loss].smooths:
        return lambda outputs, batch: sums(outputs, batch, label_smoothing)
    if label_smoothing:
        raise ValueError(
            f"label_smoothing must be 0 for the loss {loss}, got {label_smoothing}"
        )
    return sums


def totals(loss_fn: LossFn, outputs, batch: Mapping) -> dict[str, jax.Array]:
    """All that `loss_fn` sums, by name: "loss", "weight" and its metrics."""
    loss, weight, metrics = loss_fn(outputs, batch)
    return {"loss": loss, "weight": weight, **metrics}


def by_row(loss_fn: LossFn) -> LossFn:
    """The same loss with sums for every row of a batch, [B] each: those of the pieces
    of a sequence can be added up before they are `joined`."""

    def row(outputs, batch):
        return loss_fn(outputs[None], {k: x[None] for k, x in batch.items()})

    return jax.vmap(row)


def joined(rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The sums over a batch of what rows [B] have, each added up over the pieces of its
    sequence: "loss", "weight" and the metrics.

    A sequence is right where all its pieces are. Counts are exact up to 2^24 tokens of
    a sequence.
    """
    rows = dict(rows)
    if (right := rows.get("sequence_accuracy")) is not None:
        # A piece has all its tokens in the sum where they are right, and else none.
        rows["sequence_accuracy"] = jnp.where(right == rows["weight"], right, 0)
    return {name: jnp.sum(x) for name, x in rows.items()}


def _classification(outputs, batch, label_smoothing):
    _check_shapes(outputs, batch["targets"], 1)
    return _cross_entropy(outputs, batch["targets"], _rows(batch), label_smoothing)


def _token(outputs, batch, label_smoothing):
    _check_shapes(outputs, batch["targets"], 2)
    real = batch["mask"] & (batch["targets"] != IGNORED)
    return _cross_entropy(outputs, batch["targets"], real, label_smoothing)


def _rows(batch):
    """[B] bool, the examples that are not padding; a retrieval mask is [B, 2, L]."""
    return batch["mask"].reshape(len(batch["mask"]), -1).any(axis=-1)


def _check_shapes(outputs, targets, rank: int) -> None:
    if targets.ndim != rank or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            "outputs must be [B, K] for class targets [B] (model.head mean or last), "
            "[B, L, K] for token targets [B, L] (model.head token), got outputs "
            f"{outputs.shape} and targets {targets.shape}"
        )


def _cross_entropy(outputs, targets, real, label_smoothing):
    logits = _where(real, outputs.astype(jnp.float32))
    targets = jnp.where(real, targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    correct = logits.argmax(axis=-1) == targets
    metrics = {"accuracy": correct}
    if correct.ndim > 1:
        complete = jnp.all(correct | ~real, axis=1, keepdims=True)
        metrics["sequence_accuracy"] = jnp.broadcast_to(complete, real.shape)
    return _sums(losses, real, metrics)


def _regression(outputs, batch):
    targets, mask = batch["targets"], batch["mask"]
    if targets.ndim == outputs.ndim - 1:
        targets = targets[..., None]
    if targets.shape != outputs.shape:
        raise ValueError(
            "outputs must be [B, K] for one target per sequence, [B] or [B, K] "
            "(model.head mean or last), [B, L, K] for one per token, [B, L] or "
            f"[B, L, K] (model.head token), got outputs {outputs.shape} and targets "
            f"{batch['targets'].shape}"
        )
    real = mask if outputs.ndim == 3 else _rows(batch)
    outputs = _where(real, outputs.astype(jnp.float32))
    targets = _where(real, targets.astype(jnp.float32))
    squared = optax.squared_error(outputs, targets).mean(axis=-1)
    absolute = jnp.abs(outputs - targets).mean(axis=-1)
    return _sums(squared, real, {"absolute_error": absolute})


def _absolute(outputs, batch):
    targets = batch["targets"]
    if outputs.ndim != 3 or outputs.shape != targets.shape:
        raise ValueError(
            "outputs must be [B, L, K] like the targets (model.head token), got "
            f"outputs {outputs.shape} and targets {targets.shape}"
        )
    real = batch["mask"] & jnp.isfinite(targets).all(axis=-1)
    outputs = _where(real, outputs.astype(jnp.float32))
    targets = _where(real, targets.astype(jnp.float32))
    error = jnp.abs(outputs - targets).mean(axis=-1)
    return _sums(error, real, {"absolute_error": error})


def _frames(outputs, batch):
    targets = batch["targets"]
    if outputs.shape != targets.shape:
        raise ValueError(
            "outputs must be frames [B, L, h, w, C] like the targets, got outputs "
            f"{outputs.shape} and targets {targets.shape}"
        )
    squared, absolute = _pixel_errors(outputs, targets, batch["mask"])
    return _sums((squared + absolute) / 2, batch["mask"], {"mse": squared})


def _pixel_errors(frames, target, real):
    """Mean square and mean absolute value of frames - x per frame, x = p / 127.5 - 1 of
    the bytes p in `target`; 0 where not `real`."""
    frames = jnp.where(real[..., None, None, None], frames.astype(jnp.float32), 0)
    errors = frames - from_bytes(target)
    return tuple(f(errors).mean((-3, -2, -1)) for f in (jnp.square, jnp.abs))


def _codes(outputs, batch, label_smoothing):
    targets, real = batch["targets"], batch["mask"]
    if outputs.shape[:-1] != targets.shape or targets.ndim != 4:
        raise ValueError(
            "outputs must be [B, L, h, w, K] for codes [B, L, h, w], got outputs "
            f"{outputs.shape} and targets {targets.shape}"
        )
    places = targets.shape[2] * targets.shape[3]
    real = jnp.broadcast_to(real[..., None, None], targets.shape)
    flat = (x.reshape(len(x), -1, *x.shape[4:]) for x in (outputs, targets, real))
    loss, weight, metrics = _cross_entropy(*flat, label_smoothing)
    sums = loss, weight, {"accuracy": metrics["accuracy"]}
    return jax.tree.map(lambda total: total / places, sums)


def _autoencoder(outputs, batch):
    inputs = batch["inputs"]
    frames = inputs["frames"] if isinstance(inputs, Mapping) else inputs
    decoded = getattr(outputs, "frames", outputs)
    if not hasattr(outputs, "commitment") or decoded.shape != frames.shape:
        raise ValueError(
            f"outputs must be a Reconstruction of frames {frames.shape} for the loss "
            f"autoencoder, which model.layer vq gives, got {jnp.shape(decoded)}"
        )
    real = batch["mask"] if outputs.commitment.ndim == 2 else _rows(batch)
    squared, absolute = _pixel_errors(decoded, frames, real)
    commitment = jnp.where(real, outputs.commitment.astype(jnp.float32), 0)
    share = _where(real, outputs.usage.astype(jnp.float32))
    share = share.reshape(-1, share.shape[-1]).sum(0) / jnp.maximum(real.sum(), 1)
    over_batch = {
        "perplexity": jnp.exp(jax.scipy.special.entr(share).sum()),
        "usage": (share > 0).mean(),
    }
    metrics = {"mse": squared, "commitment": commitment}
    metrics |= {k: jnp.broadcast_to(v, real.shape) for k, v in over_batch.items()}
    return _sums((squared + absolute) / 2 + commitment, real, metrics)


def _where(real, values):
    # Before the loss, not after it: a NaN at padding would pass jnp.where backwards.
    return jnp.where(real[..., None], values, 0)


def _sums(losses, real, metrics):
    def total(values):
        return jnp.sum(jnp.where(real, values, 0), dtype=jnp.float32)

    sums = {name: total(values) for name, values in metrics.items()}
    return total(losses), jnp.sum(real, dtype=jnp.float32), sums


class Loss(NamedTuple):
    """Of one kind of task.

    Attributes:
        sums: (outputs, batch) -> (loss_sum, weight, metric_sums); it takes the label
            smoothing too where it `smooths`.
        metric: the one that chooses the best step.
        title: of that metric, at the end of a run.
        more_is_better: whether it should be large.
        smooths: whether it knows label smoothing.
        numbers: whether the outputs are answers themselves, and not scores of classes.
    """

    sums: Callable
    metric: str
    title: str
    more_is_better: bool
    smooths: bool
    numbers: bool = False

    def better(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether `scores` are better than the best so far."""
        new, old = scores[self.metric], best[self.metric]
        return new > old if self.more_is_better else new < old


# What a run makes of each at its end is in `train.endings.ENDINGS`.
LOSSES = {
    "classification": Loss(_classification, "accuracy", "accuracy", True, True),
    "token": Loss(_token, "accuracy", "accuracy", True, True),
    "regression": Loss(_regression, "loss", "error", False, False, numbers=True),
    "absolute": Loss(_absolute, "loss", "error", False, False, numbers=True),
    "frames": Loss(_frames, "mse", "mse", False, False),
    "codes": Loss(_codes, "accuracy", "accuracy", True, True),
    "autoencoder": Loss(_autoencoder, "mse", "mse", False, False),
}
