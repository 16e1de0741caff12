"""What every dataset is: splits, an endless training stream, finite evaluation.

A batch is a dict of NumPy arrays: "inputs", "targets", "mask" [B, L] (True where a
token is real) and, where the data have them, "reset" [B, L] and "dt" [B, L]. Inputs of
several parts are themselves such a dict.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from train import settings
from train.data.spec import Spec
from train.data.workers import Workers

SPLITS = ("train", "validation", "test")
LAYOUTS = ("sequence", "image")
ENDLESS = 2**52  # examples of a training stream

Example = dict[str, np.ndarray | dict[str, np.ndarray]]
Batch = dict[str, np.ndarray | dict[str, np.ndarray]]


class Rows:
    """Random access to the rows of arrays that share their first axis."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index) -> Example:
        return {name: array[index] for name, array in self._arrays.items()}


class Drawn:
    """Random access to `count` examples that exist only while they are looked at.

    Example i depends on (seed, split, i) and nothing else: not on the machine, the
    number of workers or what was drawn before.

    Args:
        draw: numpy Generator -> example; a partial of a module's function, which worker
            processes find.
        seed, split: whose examples.
        count: how many there are.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator], Example],
        seed: int,
        split: str,
        count: int,
    ):
        self._draw = draw
        self._key = seed, SPLITS.index(split)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of {self._count} examples")
        return self._draw(np.random.default_rng((*self._key, int(index))))


class First:
    """Random access to the first `count` examples of a source, or all it has."""

    def __init__(self, source: Sequence[Example], count: int):
        self._source = source
        self._count = min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of {self._count} examples")
        return self._source[index]


def drawn_splits(
    draws: Mapping[str, Callable], sizes: Sequence[int], seed: int
) -> dict[str, Drawn]:
    """One `Drawn` for each split that has at least one example.

    Args:
        draws: split -> how an example of it is drawn.
        sizes: numbers of examples, in the order of SPLITS.
        seed: of all of them.

    Raises:
        ValueError: a negative size or seed, or nothing to train on.
    """
    at_least("seed", seed, 0)
    for split, size in zip(SPLITS, sizes, strict=True):
        at_least(split, size, int(split == "train"))
    return {
        split: Drawn(draws[split], seed, split, size)
        for split, size in zip(SPLITS, sizes, strict=True)
        if size
    }


def split_rows(
    arrays: Mapping[str, np.ndarray], indices: Mapping[str, np.ndarray]
) -> dict[str, Rows]:
    """One `Rows` for each split that has at least one row."""
    return {
        split: Rows({name: array[rows] for name, array in arrays.items()})
        for split, rows in indices.items()
        if len(rows)
    }


def split_indices(
    count: int,
    validation: float,
    test: float,
    seed: int,
    labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Draws the test part from everything, then validation from what is left.

    Args:
        count: number of examples.
        validation: fraction of the examples left after the test part was cut off.
        test: fraction of all examples.
        seed: of the draw.
        labels: [count] classes whose proportions every part keeps, or None.

    Raises:
        ValueError: a fraction outside [0, 1), or a class too rare to be divided.
    """
    from sklearn.model_selection import train_test_split  # 0.5 s, only needed here

    parts, rest = {}, np.arange(count)
    for name, fraction in (("test", test), ("validation", validation)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be a fraction in [0, 1), got {fraction}")
        parts[name] = rest[:0]
        if fraction > 0:
            rest, parts[name] = train_test_split(
                rest,
                test_size=fraction,
                random_state=seed,
                stratify=None if labels is None else labels[rest],
            )
    return {"train": rest, **parts}


def at_least(name: str, value: int, least: int, why: str = "") -> None:
    """Raises a `ValueError` that names `data.name` unless `value` is large enough."""
    if value < least:
        reason = f" ({why})" if why else ""
        raise ValueError(f"data.{name} must be {least} or more{reason}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a `ValueError` that names `data.name` unless `value` is a choice."""
    if value not in choices:
        raise ValueError(
            f"data.{name} must be one of {', '.join(choices)}, got {value!r}"
        )


def laid_out(dataset: "Dataset", layout: str, size: tuple[int, int]) -> "Dataset":
    """A dataset whose examples are h w pixels, row by row, in one of `LAYOUTS`: as they
    are, or "image": inputs [h, w, C], encoder "image" and size (h, w) in the spec."""
    if layout == "sequence":
        return dataset
    spec = dataset.spec.but(encoder="image", size=size)
    shape = (*size, spec.channels)
    finish = functools.partial(_as_image, finish=dataset.finish, shape=shape)
    return dataclasses.replace(dataset, spec=spec, finish=finish)


def _as_image(example: Example, finish: Callable, shape: tuple[int, ...]) -> Example:
    example = finish(example)
    return {**example, "inputs": example["inputs"].reshape(shape)}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of examples and what a model has to know about them.

    Attributes:
        spec: what they are, which fills in what the model's config leaves open.
        sources: split name -> random-access examples.
        augment: (example, numpy Generator) -> example, on training examples only.
        finish: example -> {"inputs", "targets", "mask", ...}, on every example.
    """

    spec: Spec
    sources: Mapping[str, Sequence[Example]]
    augment: Callable[[Example, np.random.Generator], Example] | None = None
    finish: Callable[[Example], Example] | None = None

    def num_examples(self, split: str) -> int:
        """How many examples `split` has."""
        return len(self._source(split))

    def shortened(self, count: int) -> "Dataset":
        """Only the first `count` examples of every split; `ValueError` below 1."""
        if count < 1:
            raise ValueError(f"examples must be 1 or more, got {count}")
        sources = {name: First(source, count) for name, source in self.sources.items()}
        return dataclasses.replace(self, sources=sources)

    def train(self, batch_size: int, seed: int, workers: int = 0) -> "TrainIterator":
        """The endless stream of training batches; a function of its arguments only.

        Every epoch is a new permutation that holds each example once. Batches are cut
        from the endless stream, so that one may span two epochs and nothing is dropped.

        Args:
            batch_size: examples in a batch, at most those of the training split.
            seed: of the permutations and the augmentation.
            workers: processes that prepare batches; 0 prepares them in this one. The
                stream does not depend on it.

        Raises:
            ValueError: an argument outside these bounds.
        """
        source = self._source("train")
        settings.check("train.batch_size", batch_size, 1)
        settings.check("data.workers", workers, 0)
        if not 1 <= batch_size <= len(source):
            raise ValueError(
                f"train.batch_size must be between 1 and {len(source)}, the number of "
                f"training examples, got {batch_size}"
            )
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        settings.check_memory(
            "train.batch_size",
            batch_size * self._example_bytes(),
            f"a batch of {batch_size} examples",
        )
        return TrainIterator(
            self._stream(source, batch_size, seed),
            {"seed": seed, "batch_size": batch_size, "num_examples": len(source)},
            workers,
        )

    def evaluation(self, split: str, batch_size: int) -> "Evaluation":
        """The batches of `split`, in order, all of one shape.

        The last batch is filled up with copies of its last row whose mask is all
        False: they are harmless to a model and have no weight in a loss. So a batch may
        be larger than the split.

        Raises:
            ValueError: an unknown split, or a batch_size below 1.
        """
        source = self._source(split)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        return Evaluation(source, self.finish, batch_size)

    def _example_bytes(self) -> int:
        """About how much an example has, before one is made."""
        spec = self.spec
        size = spec.size if spec.encoder == "video" else ()
        places = math.prod((spec.length, *size))
        item = 1 if spec.loss in ("frames", "autoencoder") else 4
        return places * spec.channels * item

    def _source(self, split: str) -> Sequence[Example]:
        if split not in self.sources:
            raise ValueError(
                f"split must be one of {', '.join(self.sources)}, got {split!r}"
            )
        return self.sources[split]

    def _stream(self, source, batch_size: int, seed: int) -> grain.MapDataset:
        # Grain's epoch e is shuffled by seed + e: without the hash, the runs of
        # neighbouring seeds would see one another's permutations.
        shuffle_seed, augment_seed = map(
            int, np.random.SeedSequence(seed).generate_state(2)
        )
        # Not for ever: Grain rounds the number of batches as a float, and the next one
        # above its "for ever" is no length any more.
        epochs = max(1, ENDLESS // len(source))
        stream = grain.MapDataset.source(source).shuffle(shuffle_seed).repeat(epochs)
        if self.augment is not None:
            stream = stream.random_map(self.augment, seed=augment_seed)
        if self.finish is not None:
            stream = stream.map(self.finish)
        return stream.batch(batch_size)


class TrainIterator(Iterator[Batch]):
    """Endless batches whose position is a small, JSON-able state.

    The state is the number of batches taken and what the stream is a function of; the
    number of workers is no part of it, so that a run may resume with another.
    """

    def __init__(self, stream: grain.MapDataset, identity: dict, workers: int):
        self._stream = stream
        self._identity = identity
        self._workers = workers
        self._taken = 0
        self._batches = None

    def __next__(self) -> Batch:
        batch = next(self._started())
        self._taken += 1
        return batch

    def ready(self, stopped: Callable[[], object]) -> bool:
        """Waits for the next batch, but no longer once `stopped()` is true: then there
        may be none yet, and the position has not moved.

        Raises:
            WorkerError: the process that prepares it has died.
        """
        batches = self._started()
        return not isinstance(batches, Workers) or batches.ready(stopped)

    def get_state(self) -> dict[str, int]:
        """The position: the next batch after `set_state(state)` is the next one now."""
        return {"batches": self._taken, **self._identity}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Moves to a position that `get_state` returned.

        Raises:
            ValueError: the state of another stream (seed, batch size or data differ).
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"this data stream has {name} {value}, the saved one had "
                    f"{state[name]}: resume with the settings the run began with"
                )
        self.close()
        self._taken = int(state["batches"])

    def close(self) -> None:
        """Ends the worker processes; the next `next` starts them anew."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _started(self) -> Iterator[Batch]:
        if self._batches is None:
            if self._workers:
                self._batches = Workers(self._stream, self._taken, self._workers)
            else:
                # One thread keeps the order and prepares the next batch during a step;
                # Grain's default of 16 only competes with it for the cores.
                reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
                rest = self._stream[self._taken :]
                self._batches = iter(rest.to_iter_dataset(reading))
        return self._batches


class Evaluation:
    """A finite, repeatable sequence of batches; see `Dataset.evaluation`."""

    def __init__(self, source, finish, batch_size: int):
        self._source = source
        self._finish = finish
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._source), self._batch_size):
            stop = min(start + self._batch_size, len(self._source))
            examples = [self._source[i] for i in range(start, stop)]
            if self._finish is not None:
                examples = [self._finish(example) for example in examples]
            yield _padded_batch(examples, self._batch_size)


def _padded_batch(examples: list[Example], batch_size: int) -> Batch:
    missing = batch_size - len(examples)
    rows = examples + [examples[-1]] * missing
    batch = _by_array(lambda *arrays: np.stack(arrays), *rows)
    batch["mask"][len(examples) :] = False
    return batch


def _by_array(f: Callable, *examples: Example) -> Example:
    """`f` of the arrays that have one place in the examples, dicts within dicts."""
    return {
        name: _by_array(f, *values) if isinstance(values[0], dict) else f(*values)
        for name in examples[0]
        for values in [[example[name] for example in examples]]
    }
