"""What is to be known of a dataset before it is trained on.

All of it is looked at where it lies in arrays, and some examples of each split where it
is drawn or read.
"""

import math
from collections.abc import Mapping

import numpy as np

from train.data.pipeline import Dataset
from train.data.sources import SPLITS, Rows
from train.losses import IGNORED

ARRAYS = 2**24  # numbers of a split that lies in arrays are looked at
COMPARED = 2**28  # numbers of a split that are compared with training's
COUNTED = 2**20  # classes of which each has a count of its own
EXAMPLES = 512  # of a split that does not
NUMBERS = 2**21  # in those

LIKE_NUMBERS = 24  # distinct tokens from which on they may have been numbers
SMOOTH = 0.5  # how much neighbours differ, as a share of how much any two do

CLASSES = ("classification", "token", "codes")


def facts(dataset: Dataset) -> dict:
    """What a dataset is, as JSON holds it.

    Returns:
        "splits": of each split "sequences", "examined" (how many of them were looked
            at) and "length", {"min", "median", "max"} of the real tokens.
        "encoder", "loss", "channels", "vocab_size", "outputs": of the spec.
        "dtype", "low", "high": of the inputs, as they came from a file or, where they
            come from none, as the model takes them.
        "why": why they are tokens or numbers; "" where nothing was chosen.
        "normalised": {"mean", "std"}, lists over channels, or None.
        "scale": {"mean", "std"} of the training inputs as the model takes them, lists
            over channels; None for what are no numbers.
        "constant": the channels that are constant in the training part.
        "classes": names, [] where they have none.
        "largest": {"class", "share"} of the training part, or None.
        "chance": {"split", "metric", "value"}: the accuracy of always answering that
            class, or the loss of always answering the mean of the training targets;
            None where neither means anything.
        "targets": {"mean", "std"}, lists over outputs of a regression, or None.
        "repeated": split -> how many of its sequences training has too.
        "validated": how many sequences of test validation has too.
        "missing": split -> names of training's classes that it does not have.
        "unseen": split -> names of its classes that training does not have.
        "sorted": the given splits whose rows stand in the order of their classes.
        "real": the share of real tokens in the training part.
        "smooth": how much neighbouring tokens differ, as a share of how much any two
            do, where that is little; else None.
        "distinct", "tokens": how many kinds of tokens there are among how many; None
            where the user asked for tokens, or there are none.
        "warnings": what the reader had to say.
    """
    spec, reading = dataset.spec, dataset.reading
    splits = sorted(dataset.sources, key=[*SPLITS, *dataset.sources].index)
    parts = {split: _part(dataset, split) for split in splits}
    train = next(iter(parts.values()))  # of what has nothing else, that
    summary = {
        "splits": {split: _size(part) for split, part in parts.items()},
        "encoder": spec.encoder,
        "loss": spec.loss,
        "channels": spec.channels,
        "vocab_size": spec.vocab_size,
        "outputs": spec.outputs,
        "classes": list(spec.classes),
        **_came(reading, train),
        "normalised": None,
        **_scale(spec, train),
        **_classes(dataset, parts),
        **_regression(dataset, parts),
        **_copies(parts),
        "real": float(train["mask"].mean()),
        **_tokens(dataset, train),
        "warnings": list(reading.warnings) if reading else [],
    }
    if spec.mean:
        summary["normalised"] = {"mean": list(spec.mean), "std": list(spec.std)}
    return summary


def _part(dataset: Dataset, split: str) -> dict:
    """inputs, targets and mask of the examples of a split that are looked at, how many
    there are, and "every": the same of all of them, or None."""
    source, finish, spec = dataset.sources[split], dataset.finish, dataset.spec
    count, keys = len(source), ("inputs", "targets", "mask")
    frame = spec.size if spec.encoder == "video" else ()
    size = math.prod((max(1, spec.length), *frame, spec.channels))
    if isinstance(source, Rows) and finish is None:
        every = {key: source.arrays[key] for key in keys}
        chosen = _evenly(count, max(EXAMPLES, ARRAYS // size))
        rows = slice(None) if len(chosen) == count else np.array(chosen)
        arrays = {key: array[rows] for key, array in every.items()}
    else:
        chosen = _evenly(count, min(EXAMPLES, max(8, NUMBERS // size)))
        examples = [source[i] for i in chosen]
        if finish is not None:
            examples = [finish(example) for example in examples]
        arrays = {
            "inputs": np.stack([_largest(example["inputs"]) for example in examples]),
            "targets": np.stack([example["targets"] for example in examples]),
            "mask": np.stack([example["mask"] for example in examples]),
        }
        every = arrays.copy() if len(chosen) == count else None
    return arrays | {"count": count, "every": every}


def _evenly(count: int, most: int) -> list[int] | range:
    """At most so many of `count` indices, from the first to the last."""
    if count <= most:
        return range(count)
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _largest(inputs):
    """Inputs, or of those of several parts the one that is largest."""
    if isinstance(inputs, Mapping):
        return max(inputs.values(), key=np.size)
    return inputs


def _size(part: dict) -> dict:
    lengths = part["mask"].sum(axis=-1).ravel()
    return {
        "sequences": part["count"],
        "examined": len(part["mask"]),
        "length": {
            "min": int(lengths.min()),
            "median": int(np.median(lengths)),
            "max": int(lengths.max()),
        },
    }


def _came(reading, train: dict) -> dict:
    if reading is not None:
        return {key: getattr(reading, key) for key in ("dtype", "low", "high", "why")}
    inputs = train["inputs"]
    low, high = float(inputs.min()), float(inputs.max())
    return {"dtype": str(inputs.dtype), "low": low, "high": high, "why": ""}


def _scale(spec, train: dict) -> dict:
    if spec.encoder != "scalar":
        return {"scale": None, "constant": []}
    values = train["inputs"][train["mask"]].reshape(-1, spec.channels)
    constant = np.flatnonzero((values == values[0]).all(axis=0)).tolist()
    mean = values.mean(axis=0, dtype=np.float64)
    std = values.std(axis=0, dtype=np.float64)
    return {
        "scale": {"mean": mean.tolist(), "std": std.tolist()},
        "constant": constant,
    }


def _classes(dataset: Dataset, parts: dict) -> dict:
    """What there is to say of targets that are classes."""
    nothing = {"largest": None, "missing": {}, "unseen": {}, "sorted": []}
    nothing["chance"] = None
    if dataset.spec.loss not in CLASSES:
        return nothing
    counts = {
        split: _counts(dataset.spec, part["every"] or part)
        for split, part in parts.items()
    }
    first = next(iter(parts))
    train = counts[first]
    if not train:
        return nothing
    largest = max(train, key=train.get)
    share = train[largest] / sum(train.values())
    missing, unseen, ordered = {}, {}, []
    for split, part in parts.items():
        if split == first or dataset.spec.loss != "classification":
            continue
        if part["every"] and parts[first]["every"]:
            here = counts[split]
            missing[split] = _names(dataset, sorted({*train} - {*here}))
            unseen[split] = _names(dataset, sorted({*here} - {*train}))
        by_file = dataset.reading is not None and dataset.reading.split == "given"
        targets = (part["every"] or part)["targets"]
        several = len(targets) > 2 * len(counts[split]) > 2
        if by_file and several and (np.diff(targets) >= 0).all():
            ordered.append(split)
    judged = _judged(parts)
    value = counts[judged].get(largest, 0) / max(1, sum(counts[judged].values()))
    return {
        "largest": {"class": _names(dataset, [largest])[0], "share": share},
        "missing": {split: names for split, names in missing.items() if names},
        "unseen": {split: names for split, names in unseen.items() if names},
        "sorted": ordered,
        "chance": {"split": judged, "metric": "accuracy", "value": float(value)},
    }


def _counts(spec, part: dict) -> dict[int, int]:
    """How often each class is a target that counts, of those that are one."""
    targets, mask = part["targets"], part["mask"]
    if spec.loss != "classification":
        targets = targets[mask]
    targets = targets[targets != IGNORED].astype(np.int64)
    if spec.outputs > COUNTED:
        classes, counts = np.unique(targets, return_counts=True)
    else:  # faster, in memory that grows with the largest class
        counts = np.bincount(targets)
        classes = np.flatnonzero(counts)
        counts = counts[classes]
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def _names(dataset: Dataset, classes) -> list[str]:
    return [dataset.spec.name(int(i)) for i in classes]


def _judged(parts: dict) -> str:
    return next(split for split in ("test", "validation", "train") if split in parts)


def _regression(dataset: Dataset, parts: dict) -> dict:
    """What there is to say of targets that are numbers, and of none."""
    if dataset.spec.loss in CLASSES:
        return {"targets": None}
    if dataset.spec.loss != "regression":
        return {"targets": None, "chance": None}
    train, judged = _values(dataset, next(iter(parts.values()))), _judged(parts)
    mean, std = train.mean(axis=0), train.std(axis=0)
    error = float(((_values(dataset, parts[judged]) - mean) ** 2).mean())
    return {
        "targets": {"mean": mean.tolist(), "std": std.tolist()},
        "chance": {"split": judged, "metric": "loss", "value": error},
    }


def _values(dataset: Dataset, part: dict) -> np.ndarray:
    """The targets that count, [..., outputs], in float64."""
    targets, mask = part["targets"], part["mask"]
    if targets.shape[1:2] == mask.shape[1:] and mask.ndim == 2:
        targets = targets[mask]
    return targets.reshape(-1, dataset.spec.outputs).astype(np.float64)


def _copies(parts: dict) -> dict:
    digests = {split: [*_digests(part["every"])] for split, part in parts.items()}

    def among(split: str, other: str) -> int:
        """How many sequences of a split the other has too."""
        known = {*digests.get(other, ())}
        return sum(digest in known for digest in digests.get(split, ()))

    counts = {split: among(split, "train") for split in digests if split != "train"}
    return {
        "repeated": {split: count for split, count in counts.items() if count},
        "validated": among("test", "validation"),
    }


def _digests(every: dict | None):
    """A number for the real tokens of each sequence; none where that takes long."""
    if every is None or every["inputs"].size > COMPARED:
        return
    inputs, mask = every["inputs"], every["mask"]
    by_token = inputs.shape[: mask.ndim] == mask.shape
    for x, real in zip(inputs, mask, strict=True):
        yield hash((x[real] if by_token else x).tobytes())


def _tokens(dataset: Dataset, train: dict) -> dict:
    """What tells numbers that were taken for tokens."""
    inputs, mask, reading = train["inputs"], train["mask"], dataset.reading
    if dataset.spec.encoder != "token" or reading is None or reading.asked:
        return {"smooth": None, "distinct": None, "tokens": None}
    values = np.sort(inputs[mask][: 2**20]).astype(np.float64)
    n, distinct = len(values), len(np.unique(values))
    measures = {"smooth": None, "distinct": distinct, "tokens": n}
    both = mask[:, 1:] & mask[:, :-1]
    steps = np.abs(np.diff(inputs.astype(np.int64), axis=1))[both]
    # The mean distance of any two, of the sorted ones.
    any_two = 2 * ((2 * np.arange(1, n + 1) - n - 1) * values).sum() / n**2
    if steps.size and any_two and distinct >= LIKE_NUMBERS:
        smooth = float(steps.mean() / any_two)
        measures["smooth"] = smooth if smooth < SMOOTH else None
    return measures
