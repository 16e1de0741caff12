"""What is learned from a dataset, where that is not what its targets say.

Self-pretraining (https://arxiv.org/abs/2310.02980) trains on the inputs of the task's
own data first. "masked" hides tokens and asks for them: a hidden token of a vocabulary
is one more token, a hidden number is 0, and one more channel says which are hidden.
"next" asks at every token for the one after it. "marked" is what follows "masked": the
task itself, its inputs as that had them, nothing hidden.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from train import settings
from train.data.pipeline import Dataset
from train.data.sources import Example
from train.data.spec import Spec

MASK = "<mask>"
SEEDS = 2**63


class Options(NamedTuple):
    """Of an objective; `config.data.objective` has them beside its name.

    Attributes:
        ratio: of "masked": the share of tokens that are hidden, each by itself.
        levels: 0: numbers are asked for as such, by their distance; else as one of so
            many classes, equal steps from `low` to `high`.
        low, high: of the numbers.
        documents: how many sequences an example of the task has, each of which is one
            here: 2 where a model compares two.
    """

    ratio: float = 0.5
    levels: int = 0
    low: float = 0.0
    high: float = 1.0
    documents: int = 1


class Objective(NamedTuple):
    """A row of OBJECTIVES.

    Attributes:
        spec: (spec, options) -> what the dataset then says of itself.
        ask: (example, options, spec, rng) -> the example, of an example of the task.
        drawn: whether `ask` reads its random numbers.
    """

    spec: Callable[[Spec, Options], Spec]
    ask: Callable[[Example, Options, Spec, np.random.Generator], Example]
    drawn: bool = False


def reconstruction(dataset: Dataset, name: str) -> Dataset:
    """Its inputs are to be reconstructed, its targets are not read.

    Raises:
        ValueError: a dataset that has no frames of pixels.
    """
    return dataclasses.replace(dataset, spec=reconstructed(dataset.spec, name))


def reconstructed(spec: Spec, name: str) -> Spec:
    """The spec of what `reconstruction` makes; raises what it raises."""
    if spec.loss != "frames":
        raise ValueError(
            f"data.reconstruct is for frames of pixels, which the dataset {name!r} "
            "does not have here; it must be False"
        )
    return spec.but(loss="autoencoder", causal=False)


def asked(dataset: Dataset, objective: Mapping) -> Dataset:
    """The dataset with another objective.

    Args:
        dataset: of sequences of tokens or numbers.
        objective: "name", a key of OBJECTIVES, and those of `Options`.

    Raises:
        ValueError: an option out of its bounds, or a dataset that has no such
            sequences.
    """
    row, options = _read(objective)
    spec = asked_spec(dataset.spec, objective)
    ask = functools.partial(row.ask, options=options, spec=dataset.spec)
    return dataclasses.replace(
        dataset,
        spec=spec,
        sources={
            split: Numbered(source, options.documents)
            for split, source in dataset.sources.items()
        },
        augment=functools.partial(_augmented, augment=dataset.augment, drawn=row.drawn)
        if dataset.augment or row.drawn
        else None,
        finish=functools.partial(
            _finished, finish=dataset.finish, ask=ask, documents=options.documents
        ),
    )


def asked_spec(spec: Spec, objective: Mapping) -> Spec:
    """The spec of what `asked` makes; raises what it raises."""
    row, options = _read(objective)
    if spec.encoder not in ("token", "scalar") or spec.size:
        raise ValueError(
            "data.objective must be label, what the data ask themselves, unless they "
            f"are sequences of tokens or numbers, got {objective['name']!r} for "
            f"{spec.encoder or 'other'} inputs"
        )
    if options.levels and spec.encoder == "scalar" and spec.channels != 1:
        raise ValueError(
            "data.objective.levels must be 0 for numbers of several channels, got "
            f"{options.levels} for {spec.channels}"
        )
    return row.spec(spec, options)


def _read(objective: Mapping) -> tuple[Objective, Options]:
    given = dict(objective)
    name = given.pop("name", None)
    if name not in OBJECTIVES:
        raise ValueError(
            f"data.objective.name must be one of {', '.join(OBJECTIVES)}, got {name!r}"
        )
    settings.check_options("data.objective", given, Options._field_defaults)
    options = Options(**given)
    if not 0 < options.ratio <= 1:
        raise ValueError(f"data.objective.ratio must be in (0, 1], got {options.ratio}")
    if options.levels < 0 or options.levels == 1:
        raise ValueError(
            f"data.objective.levels must be 0, or 2 or more, got {options.levels}"
        )
    if not options.low < options.high:
        raise ValueError(
            f"data.objective.low must be below high, got {options.low} and "
            f"{options.high}"
        )
    if options.documents not in (1, 2):
        raise ValueError(
            f"data.objective.documents must be 1 or 2, got {options.documents}"
        )
    return OBJECTIVES[name], options


class Numbered:
    """Random access to the sequences of a source's examples, and their numbers."""

    def __init__(self, source, documents: int = 1):
        self._source, self._documents = source, documents

    def __len__(self) -> int:
        return self._documents * len(self._source)

    def __getitem__(self, index) -> Example:
        number = int(index)
        return {"number": number, "seed": number, "example": self._example(number)}

    def _example(self, number: int) -> Example:
        return self._source[number // self._documents]


def _augmented(numbered: Example, rng, augment, drawn: bool) -> Example:
    """One to train on: what is hidden in it is drawn anew whenever it comes."""
    example = numbered["example"]
    if augment is not None:
        example = augment(example, rng)
    seed = int(rng.integers(SEEDS)) if drawn else numbered["seed"]
    return {**numbered, "seed": seed, "example": example}


def _finished(numbered: Example, finish, ask, documents: int) -> Example:
    example = numbered["example"]
    if finish is not None:
        example = finish(example)
    if documents > 1:
        which = numbered["number"] % documents
        keys = [key for key in example if key != "targets"]
        example = {key: example[key][which] for key in keys} | {"targets": None}
    return ask(example, rng=np.random.default_rng(numbered["seed"]))


def _masked_spec(spec: Spec, options: Options) -> Spec:
    return _asking(_marked_spec(spec, options), spec, options)


def _next_spec(spec: Spec, options: Options) -> Spec:
    return _asking(spec, spec, options).but(causal=True)


def _marked_spec(spec: Spec, options: Options) -> Spec:
    if spec.encoder == "token":
        symbols = (*spec.symbols, MASK) if spec.symbols else ()
        return spec.but(vocab_size=spec.vocab_size + 1, symbols=symbols)
    scaled = bool(spec.mean)
    return spec.but(
        channels=spec.channels + 1,
        mean=(*spec.mean, 0.0) if scaled else (),
        std=(*spec.std, 1.0) if scaled else (),
    )


def _asking(inputs: Spec, spec: Spec, options: Options) -> Spec:
    """What asks for tokens or numbers of `spec` where it has `inputs`."""
    if spec.encoder == "token":
        return inputs.but(loss="token", outputs=spec.vocab_size, classes=())
    if options.levels:
        return inputs.but(loss="token", outputs=options.levels, classes=())
    return inputs.but(loss="absolute", outputs=spec.channels, classes=())


def _mask(example: Example, options: Options, spec: Spec, rng) -> Example:
    hidden = (rng.random(len(example["mask"])) < options.ratio) & example["mask"]
    targets = _targets(example["inputs"], hidden, options, spec)
    return {**_marked(example, spec, hidden), "targets": targets}


def _mark(example: Example, options: Options, spec: Spec, rng) -> Example:
    return _marked(example, spec, np.zeros_like(example["mask"]))


def _marked(example: Example, spec: Spec, hidden: np.ndarray) -> Example:
    inputs = example["inputs"]
    if spec.encoder == "token":
        inputs = np.where(hidden, spec.vocab_size, inputs).astype(np.int32)
    else:
        mark = hidden[..., None]
        shown = np.where(mark, 0, inputs.reshape(*hidden.shape, -1))
        inputs = np.concatenate([shown, mark], axis=-1).astype(np.float32)
    return {**example, "inputs": inputs}


def _next(example: Example, options: Options, spec: Spec, rng) -> Example:
    inputs, real = example["inputs"], example["mask"]
    follows = np.append(real[:-1] & real[1:], False)
    if "reset" in example:  # what begins anew is not to be told from before
        follows[:-1] &= ~example["reset"][1:]
    after = np.concatenate([inputs[1:], inputs[:1]])
    return {**example, "targets": _targets(after, follows, options, spec)}


def _targets(values, wanted: np.ndarray, options: Options, spec: Spec) -> np.ndarray:
    """The values where they are asked for; -1, or NaN, elsewhere."""
    if spec.encoder == "scalar" and not options.levels:
        values = values.reshape(len(wanted), -1).astype(np.float32)
        return np.where(wanted[:, None], values, np.float32(np.nan))
    if options.levels and spec.encoder == "scalar":
        share = (values.reshape(-1) - options.low) / (options.high - options.low)
        values = np.clip(np.round(share * (options.levels - 1)), 0, options.levels - 1)
    return np.where(wanted, values, -1).astype(np.int32)


# Beside "label", what the data ask themselves.
OBJECTIVES = {
    "masked": Objective(_masked_spec, _mask, drawn=True),
    "next": Objective(_next_spec, _next),
    "marked": Objective(_marked_spec, _mark),
}
