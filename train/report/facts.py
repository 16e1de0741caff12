"""What a run has kept of its data, as a page shows it.

It is what `records.read_said` reads, and may come from anyone: a key that is not there,
or whose value is not what it was to be, is left out.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from train.data.said import warnings

MOST = 12  # names of classes, or numbers of a list


class Level(NamedTuple):
    """A score without the inputs: the metric, its value, and a sentence about it."""

    metric: str
    value: float
    said: str


def level(said: Mapping) -> Level | None:
    """What is reached without reading the inputs, where the facts have it."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        metric, split = said["chance"]["metric"], str(said["chance"]["split"])
        value = float(said["chance"]["value"])
        if metric == "accuracy":
            which = said["largest"]["class"]
            text = f"Chance is {value:.4f} on {split}: always answering {which}, the "
            return Level(metric, value, text + "most frequent in training.")
        if metric == "loss":
            text = "Always answering the mean of the training targets has the error "
            return Level(metric, value, f"{text}{value:.4g} on {split}.")
    return None


def rows(said: Mapping) -> list[tuple[str, str]]:
    """The rows of a table, a fact each."""
    found = []
    for name, words in ROWS.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            found += [(name, text)] if (text := words(said)) else []
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        sizes = [(split, _split(part)) for split, part in said["splits"].items()]
        found = sizes + found
    return found


def warned(said: Mapping) -> list[str]:
    """What the run was warned of."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        return warnings(said)
    found = said.get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


def _split(part: Mapping) -> str:
    few, middle, most = (int(part["length"][k]) for k in ("min", "median", "max"))
    text = f"{int(part['sequences']):,} sequences of "
    text += f"{few:,}" if few == most else f"{few:,} to {most:,} (median {middle:,})"
    text += " tokens"
    if part["examined"] < part["sequences"]:
        text += f"; {int(part['examined']):,} were looked at"
    return text


def _inputs(said) -> str:
    if said["encoder"] == "token":
        text = f"tokens of a vocabulary of {int(said['vocab_size']):,}"
    else:
        channels = int(said["channels"])
        text = (
            f"{said['dtype']} in [{float(said['low']):.6g}, {float(said['high']):.6g}]"
        )
        text += f", {channels:,} channel{'s' * (channels != 1)}"
    return text + (f": {said['why']}" if said["why"] else "")


def _scale(key: str) -> Callable[[Mapping], str]:
    def words(said) -> str:
        if not said[key]:
            return ""
        mean, std = (_numbers(said[key][k]) for k in ("mean", "std"))
        return f"mean {mean}, std {std}"

    return words


def _classes(said) -> str:
    names = said.get("classes") or []
    text = f"{int(said['outputs']):,}"
    if names:
        shown = ", ".join(str(name) for name in names[:MOST])
        text += f": {shown}" + " ..." * (len(names) > MOST)
    if largest := said.get("largest"):
        share = float(largest["share"])
        text += f"; the largest is {largest['class']}, {share:.1%} of training"
    return text if largest or names else ""


def _numbers(values) -> str:
    shown = " ".join(f"{float(x):.3g}" for x in values[:MOST])
    return shown + " ..." * (len(values) > MOST)


ROWS = {
    "inputs": _inputs,
    "normalised by": _scale("normalised"),
    "as the model reads them": _scale("scale"),
    "classes": _classes,
    "targets": _scale("targets"),
    "loss": lambda said: str(said["loss"]),
}
