"""What every dataset is: splits, an endless training stream, finite evaluation.

A batch is a dict of NumPy arrays: "inputs", "targets", "mask" [B, L] (True where a
token is real) and, where the data have them, "reset" [B, L] and "dt" [B, L]. Inputs of
several parts are themselves such a dict.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from train import settings
from train.data.buckets import ENDLESS, Batches, Options, Pieces, divided, line
from train.data.reading import Reading
from train.data.sources import Example, First
from train.data.spec import Spec
from train.data.workers import Workers

LAYOUTS = ("sequence", "image")

Batch = dict[str, np.ndarray | dict[str, np.ndarray]]


def laid_out(dataset: "Dataset", layout: str, size: tuple[int, int]) -> "Dataset":
    """A dataset whose examples are h w pixels, row by row, in one of `LAYOUTS`: as they
    are, or "image": inputs [h, w, C], encoder "image" and size (h, w) in the spec."""
    if layout == "sequence":
        return dataset
    spec = laid_out_spec(dataset.spec, layout, size)
    shape = (*size, spec.channels)
    finish = functools.partial(_as_image, finish=dataset.finish, shape=shape)
    return dataclasses.replace(dataset, spec=spec, finish=finish)


def laid_out_spec(spec: Spec, layout: str, size: tuple[int, int]) -> Spec:
    """The spec of what `laid_out` makes."""
    return spec if layout == "sequence" else spec.but(encoder="image", size=size)


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
        reading: how the file that it is from was read; None where it is from none.
        digest: of what it is made of; "" where nobody has computed one.
        buckets: of what lengths the training batches are; None: of one.
    """

    spec: Spec
    sources: Mapping[str, Sequence[Example]]
    augment: Callable[[Example, np.random.Generator], Example] | None = None
    finish: Callable[[Example], Example] | None = None
    reading: Reading | None = None
    digest: str = ""
    buckets: Options | None = None

    @functools.cached_property
    def pieces(self) -> list[Pieces]:
        """The sequences to train on by their lengths, for which each is read once."""
        return divided(self._source("train"), self.finish, self.spec, self.buckets)

    def num_examples(self, split: str) -> int:
        """How many examples `split` has."""
        return len(self._source(split))

    def shortened(self, count: int) -> "Dataset":
        """Only the first `count` examples of every split; `ValueError` below 1."""
        if count < 1:
            raise ValueError(f"examples must be 1 or more, got {count}")
        sources = {name: First(source, count) for name, source in self.sources.items()}
        return dataclasses.replace(self, sources=sources)

    def train(
        self,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rows: Callable[[int], Sequence[int]] | None = None,
    ) -> "TrainIterator":
        """The endless stream of training batches; a function of its arguments only.

        Every epoch is a new permutation that holds each example once. Batches are cut
        from the endless stream, so that one may span two epochs and nothing is dropped.

        Args:
            batch_size: examples in a batch, at most those of the training split; with
                buckets, in a batch of the longest.
            seed: of the permutations and the augmentation.
            workers: processes that prepare batches; 0 prepares them in this one. The
                stream does not depend on it.
            rows: of a batch of so many, those that are wanted and no others are read,
                such as those of one of several hosts; None: all.

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
        identity = {"seed": seed, "batch_size": batch_size, "num_examples": len(source)}
        if self.buckets:
            batches = self._batches(batch_size, seed, rows)
            stream = grain.MapDataset.source(batches)
            identity["sequences"] = [*batches.plan.counts]
        else:
            own = None if rows is None else rows(batch_size)
            stream = self._stream(source, batch_size, seed, own)
        return TrainIterator(stream, identity, workers)

    def samples(
        self,
        batch_size: int,
        seed: int,
        rows: Callable[[int], Sequence[int]] | None = None,
    ) -> list[Batch]:
        """A batch of every shape that `train` has, the longest sequences first; its
        arguments and errors are those of `train`."""
        with contextlib.closing(self.train(batch_size, seed, 0, rows)) as batches:
            if not self.buckets:
                return [next(batches)]
        return self._batches(batch_size, seed, rows).samples()

    def describe_buckets(self, batch_size: int) -> str:
        """A line that says what `train` draws batches from, where there are buckets."""
        plan = self._batches(batch_size, 0, None).plan
        return line(plan, self.pieces)

    def _batches(self, batch_size, seed, rows) -> Batches:
        longest = self.buckets.longest or self.spec.length
        return Batches(
            self._source("train"),
            self.augment,
            self.finish,
            self.spec,
            self.pieces,
            self.buckets,
            batch_size * longest,
            seed,
            rows,
        )

    def evaluation(
        self, split: str, batch_size: int, rows: Sequence[int] | None = None
    ) -> "Evaluation":
        """The batches of `split`, in order, all of one shape.

        The last batch is filled up with copies of its last row whose mask is all
        False: they are harmless to a model and have no weight in a loss. So a batch may
        be larger than the split.

        Args:
            split: a name in `sources`.
            batch_size: examples in a batch.
            rows: as in `train`.

        Raises:
            ValueError: an unknown split, or a batch_size below 1.
        """
        source = self._source(split)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        return Evaluation(source, self.finish, batch_size, rows)

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

    def _stream(self, source, batch_size: int, seed: int, rows) -> grain.MapDataset:
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
        if rows is None or len(rows) == batch_size:
            return stream.batch(batch_size)
        own = grain.MapDataset.source(_Rows(stream, batch_size, rows))
        return own.batch(len(rows))


class _Rows(Sequence):
    """Of a stream that is cut into batches, the same rows of each, one after another.

    Behind shuffling and augmentation, whose random numbers are those of the whole
    stream: what a row is does not depend on who reads it.
    """

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._stream, self._batch_size = stream, batch_size
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, len(self._rows))
        return self._stream[batch * self._batch_size + self._rows[row]]


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
        self._ahead = collections.deque()

    def __next__(self) -> Batch:
        batch = self._ahead.popleft() if self._ahead else next(self._started())
        self._taken += 1
        return batch

    def look_ahead(self, count: int) -> None:
        """Prepares the next `count` batches now; raises what keeps one from being made.
        Those before it can still be taken."""
        while len(self._ahead) < count:
            self._ahead.append(next(self._started()))

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
            if state.get(name) != value:
                raise ValueError(
                    f"this data stream has {name} {value}, the saved one had "
                    f"{state.get(name)}: resume with the settings the run began with"
                )
        self.close()
        self._taken = int(state["batches"])

    def close(self) -> None:
        """Ends the worker processes; the next `next` starts them anew."""
        self._ahead.clear()
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
                remainder = self._stream[self._taken :]
                self._batches = iter(remainder.to_iter_dataset(reading))
        return self._batches


class Evaluation:
    """A finite, repeatable sequence of batches; see `Dataset.evaluation`."""

    def __init__(self, source, finish, batch_size: int, rows=None):
        self._source = source
        self._finish = finish
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._source), self._batch_size):
            count = min(self._batch_size, len(self._source) - start)
            # Behind the last example, copies of it.
            numbers = [min(row, count - 1) for row in self._rows]
            examples = {i: self._example(start + i) for i in {*numbers}}
            batch = _stacked([examples[i] for i in numbers])
            batch["mask"][np.asarray(self._rows) >= count] = False
            yield batch

    def _example(self, number: int) -> Example:
        example = self._source[number]
        return example if self._finish is None else self._finish(example)


def _stacked(examples: list[Example]) -> Batch:
    return _by_array(lambda *arrays: np.stack(arrays), *examples)


def _by_array(f: Callable, *examples: Example) -> Example:
    """`f` of the arrays that have one place in the examples, dicts within dicts."""
    return {
        name: _by_array(f, *values) if isinstance(values[0], dict) else f(*values)
        for name in examples[0]
        for values in [[example[name] for example in examples]]
    }
