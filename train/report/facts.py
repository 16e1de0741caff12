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
    sentence: str


def level(facts: Mapping) -> Level | None:
    """What is reached without reading the inputs, where the facts have it."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        metric, split = facts["chance"]["metric"], str(facts["chance"]["split"])
        value = float(facts["chance"]["value"])
        if metric == "accuracy":
            which = facts["largest"]["class"]
            text = f"Chance is {value:.4f} on {split}: always answering {which}, the "
            return Level(metric, value, text + "most frequent in training.")
        if metric == "loss":
            text = "Always answering the mean of the training targets has the error "
            return Level(metric, value, f"{text}{value:.4g} on {split}.")
    return None


def rows(facts: Mapping) -> list[tuple[str, str]]:
    """The rows of a table, a fact each."""
    entries = []
    for name, words in ROWS.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            entries += [(name, text)] if (text := words(facts)) else []
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        sizes = [(split, _split(part)) for split, part in facts["splits"].items()]
        entries = sizes + entries
    return entries


def warned(facts: Mapping) -> list[str]:
    """What the run was warned of."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        return warnings(facts)
    texts = facts.get("warnings")
    return [str(text) for text in texts] if isinstance(texts, list) else []


def _split(part: Mapping) -> str:
    few, middle, most = (int(part["length"][k]) for k in ("min", "median", "max"))
    text = f"{int(part['sequences']):,} sequences of "
    text += f"{few:,}" if few == most else f"{few:,} to {most:,} (median {middle:,})"
    text += " tokens"
    if part["examined"] < part["sequences"]:
        text += f"; {int(part['examined']):,} were looked at"
    return text


def _inputs(facts) -> str:
    if facts["encoder"] == "token":
        text = f"tokens of a vocabulary of {int(facts['vocab_size']):,}"
    else:
        channels = int(facts["channels"])
        low, high = float(facts["low"]), float(facts["high"])
        text = f"{facts['dtype']} in [{low:.6g}, {high:.6g}]"
        text += f", {channels:,} channel{'s' * (channels != 1)}"
    return text + (f": {facts['why']}" if facts["why"] else "")


def _scale(key: str) -> Callable[[Mapping], str]:
    def words(facts) -> str:
        if not facts[key]:
            return ""
        mean, std = (_numbers(facts[key][k]) for k in ("mean", "std"))
        return f"mean {mean}, std {std}"

    return words


def _classes(facts) -> str:
    names = facts.get("classes") or []
    text = f"{int(facts['outputs']):,}"
    if names:
        listed = ", ".join(str(name) for name in names[:MOST])
        text += f": {listed}" + " ..." * (len(names) > MOST)
    if largest := facts.get("largest"):
        share = float(largest["share"])
        text += f"; the largest is {largest['class']}, {share:.1%} of training"
    return text if largest or names else ""


def _numbers(values) -> str:
    listed = " ".join(f"{float(x):.3g}" for x in values[:MOST])
    return listed + " ..." * (len(values) > MOST)


ROWS = {
    "inputs": _inputs,
    "normalised by": _scale("normalised"),
    "as the model reads them": _scale("scale"),
    "classes": _classes,
    "targets": _scale("targets"),
    "loss": lambda facts: str(facts["loss"]),
}
