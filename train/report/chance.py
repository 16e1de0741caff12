"""What is reached without reading the inputs."""

from typing import NamedTuple

import numpy as np

from train import signals
from train.data.pipeline import Dataset
from train.losses import IGNORED
from train.report import some

TOKENS = 2**20  # of the training split that are looked at


class Level(NamedTuple):
    """A score without the inputs: the metric, its value, and a sentence about it."""

    metric: str
    value: float
    said: str


def level(dataset: Dataset) -> Level | None:
    """The accuracy of always answering the largest class of the training split, or the
    mean squared error of always answering its mean; None for other tasks."""
    spec = dataset.spec
    if spec.loss not in ("classification", "token", "regression"):
        return None
    few = some.of(dataset, "train", TOKENS)
    size = min(256, few.num_examples("train"))
    if spec.loss == "regression":
        value = _variance(few.evaluation("train", size), spec)
        said = "Always answering the mean of the training targets has the error "
        said += f"{value:.4g}"
        name = "loss"
    else:
        seen = np.zeros(spec.outputs, np.int64)
        for batch in signals.stoppable(few.evaluation("train", size)):
            seen += np.bincount(_real(batch, spec), minlength=spec.outputs)
        if not seen.sum():
            return None
        largest, value = int(seen.argmax()), float(seen.max() / seen.sum())
        names = spec.classes or (spec.symbols if spec.loss == "token" else ())
        which = names[largest] if largest < len(names) else f"class {largest}"
        said = f"Chance is {value:.4f}: always answering {which}, the most frequent in "
        said += "training"
        name = "accuracy"
    if few is not dataset:
        said += f", by {few.num_examples('train'):,} of its examples"
    return Level(name, value, said + ".")


def _real(batch, spec) -> np.ndarray:
    """The targets that count, [n] or those of a regression [n, outputs]."""
    mask, targets = batch["mask"], np.asarray(batch["targets"])
    rows = mask.reshape(len(mask), -1).any(axis=1)
    if spec.loss == "token":
        rows = mask & (targets != IGNORED)
    elif spec.loss == "regression":
        if targets.ndim > 1 and targets.shape[:2] == mask.shape:
            rows = mask
        return targets[rows].reshape(-1, spec.outputs).astype(np.float64)
    return targets[rows]


def _variance(batches, spec) -> float:
    """The mean over the outputs of the targets' variance."""
    count, total, squares = 0, np.zeros(spec.outputs), np.zeros(spec.outputs)
    shift = None  # so that a large mean does not cancel the digits
    for batch in signals.stoppable(batches):
        real = _real(batch, spec)
        shift = real[0] if shift is None else shift
        count += len(real)
        total += (real - shift).sum(axis=0)
        squares += ((real - shift) ** 2).sum(axis=0)
    return float(np.mean(squares / count - (total / count) ** 2))
