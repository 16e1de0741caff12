"""Dataset decomposition: batches whose sequences are of one length, another in each.

As in https://arxiv.org/abs/2405.13226: sequences lie in buckets, one for each length
longest / 2^k. A batch is drawn from one of them and has 2^k times as many sequences as
one of the longest, so that all batches have as many tokens, and what a step costs is
what its sequences need. A sequence is from one document: all of it, filled up to the
shortest length that holds it (which the paper does not have), or a piece of it, of
those that its length is the sum of, the largest first. What is left then, less than the
shortest, is filled up too, so that no token is lost. Tokens that fill up are masked.

A curriculum says which bucket is next: its odds hold until a bucket is empty. A cycle
has an equal share of each bucket, an epoch all cycles, and each sequence once.
"""

import bisect
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from train import settings
from train.data.prepared import shown
from train.data.sources import Example
from train.data.spec import Spec

ENCODERS = ("token", "scalar")
ENDLESS = 2**52  # batches, and examples, of a training stream


class Options(NamedTuple):
    """Of `config.data.buckets`.

    Attributes:
        shortest: tokens of the shortest sequences; 0: no buckets.
        longest: of the longest; 0: as many as an example has.
        cut: whether documents are cut into pieces.
        curriculum: a key of CURRICULA.
        cycles: in an epoch.
    """

    shortest: int = 0
    longest: int = 0
    cut: bool = False
    curriculum: str = "natural"
    cycles: int = 1


# The odds of the buckets, by their ranks, 0 for the shortest sequences; None: every
# batch that is left has the same chance.
CURRICULA: Mapping[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "natural": None,
    "uniform": np.ones_like,
    "grow_linear": lambda rank: len(rank) - rank,
    "grow_p2": lambda rank: 2.0**-rank,
    "shrink_linear": lambda rank: 1 + rank,
    "shrink_p2": lambda rank: 2.0**rank,
}


def read(given: Mapping) -> Options | None:
    """The options of a mapping; None where it asks for no buckets.

    Raises:
        ValueError: a key that there is not, or a value out of its bounds.
    """
    settings.check_options("data.buckets", given, Options._field_defaults)
    options = Options(**given)
    for key, least in dict(shortest=0, longest=0, cycles=1).items():
        value = getattr(options, key)
        if value < least:
            raise ValueError(f"data.buckets.{key} must be {least} or more, got {value}")
    if options.curriculum not in CURRICULA:
        raise ValueError(
            f"data.buckets.curriculum must be one of {', '.join(CURRICULA)}, got "
            f"{options.curriculum!r}"
        )
    return options if options.shortest else None


def lengths(options: Options, spec: Spec) -> tuple[int, ...]:
    """Of the sequences of each bucket, the longest first.

    Raises:
        ValueError: inputs that are no sequences of tokens or numbers, or a shortest
            length that no halving of the longest comes to.
    """
    if spec.encoder not in ENCODERS or spec.size:
        raise ValueError(
            "data.buckets.shortest must be 0 unless the data are sequences of tokens "
            f"or numbers, got {options.shortest} for {spec.encoder or 'other'} inputs"
        )
    longest = options.longest or spec.length
    if longest > spec.length or (longest < spec.length and not options.cut):
        raise ValueError(
            f"data.buckets.longest must be {spec.length}, what an example has, or 0 "
            f"for that{', or less with cut' if not options.cut else ' or less'}, got "
            f"{longest}"
        )
    halved = [longest]
    while halved[-1] > 1 and halved[-1] % 2 == 0:
        halved.append(halved[-1] // 2)
    if options.shortest not in halved:
        raise ValueError(
            f"data.buckets.shortest must be {longest} halved some times, one of "
            f"{', '.join(map(str, halved))}, got {options.shortest}"
        )
    return tuple(halved[: 1 + halved.index(options.shortest)])


class Pieces(NamedTuple):
    """The sequences of a bucket: of which examples, and from which token on."""

    length: int
    numbers: np.ndarray
    starts: np.ndarray

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.numbers)


def divided(
    source: Sequence[Example], finish: Callable | None, spec: Spec, options: Options
) -> list[Pieces]:
    """The buckets that have sequences, the longest first.

    Args:
        source: the examples, each of which is read once for its length: the tokens up
            to its last real one.
        finish: what makes an example of what `source` has.
        spec: of the examples.
        options: how they are divided.

    Raises:
        ValueError: see `lengths`; or a target for the whole of what is to be cut.
    """
    sizes = lengths(options, spec)
    found = {length: ([], []) for length in sizes}
    reading = shown(range(len(source)), len(source), "measuring sequences")
    for number in reading:
        example = source[number] if finish is None else finish(source[number])
        if options.cut and not _by_token(example, spec):
            raise ValueError(
                "data.buckets.cut must be False where a whole sequence has the target, "
                f"got True for the loss {spec.loss}"
            )
        for start, length in _pieces(_length(example), sizes, options.cut):
            numbers, starts = found[length]
            numbers.append(number)
            starts.append(start)
    return [
        Pieces(length, np.array(numbers), np.array(starts))
        for length, (numbers, starts) in found.items()
        if numbers
    ]


def _length(example: Example) -> int:
    """Tokens up to the last real one, of the longest of its documents; at least 1."""
    real = np.asarray(example["mask"])
    real = real.any(axis=tuple(range(real.ndim - 1)))
    return int(np.flatnonzero(real)[-1]) + 1 if real.any() else 1


def _pieces(tokens: int, sizes: Sequence[int], cut: bool) -> list[tuple[int, int]]:
    """Where the pieces of so many tokens start, and their lengths, of `sizes`."""
    if not cut:
        return [(0, min(size for size in sizes if size >= tokens))]
    found, start = [], 0
    for size in sizes:
        while tokens - start >= size:
            found.append((start, size))
            start += size
    return found if start == tokens else [*found, (start, sizes[-1])]


def _by_token(example: Example, spec: Spec) -> bool:
    """Whether each token has a target of its own."""
    shape = np.shape(example["mask"])
    return spec.loss != "classification" and (
        np.shape(example["targets"])[: len(shape)] == shape
    )


class Plan(NamedTuple):
    """Which batch is from which bucket.

    Attributes:
        counts: sequences of each bucket, the longest first.
        sizes: sequences of a batch from each.
        curriculum, cycles: see `Options`.
        seed: of the draws.
    """

    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    curriculum: str
    cycles: int
    seed: int

    def before(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before an epoch. What of a bucket does
        not fill a batch goes into the first of the next epoch."""
        pairs = zip(self.counts, self.sizes, strict=True)
        return [epoch * count // size for count, size in pairs]

    def find(self, number: int) -> tuple[int, int]:
        """The bucket of batch `number`, and which of its batches it is."""

        def total(epoch):
            return sum(self.before(epoch))

        epoch = bisect.bisect_right(range(ENDLESS), number, key=total) - 1
        buckets, which = _epoch(self, epoch)
        place = number - total(epoch)
        return int(buckets[place]), int(which[place])


@functools.lru_cache(2)
def _epoch(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of the batches of an epoch, and which of theirs each is."""
    rng = np.random.default_rng((plan.seed, epoch))
    first, after = np.array([plan.before(epoch), plan.before(epoch + 1)])
    shares = [
        (after - first) * cycle // plan.cycles for cycle in range(plan.cycles + 1)
    ]
    buckets = np.concatenate(
        [_drawn(rng, share, plan.curriculum) for share in np.diff(shares, axis=0)]
    )
    which = np.zeros(len(buckets), int)
    for bucket, start in enumerate(first):
        own = buckets == bucket
        which[own] = start + np.arange(own.sum())
    return buckets, which


def _drawn(rng: np.random.Generator, left: np.ndarray, curriculum: str) -> np.ndarray:
    """As many of each bucket as are `left`, in an order that the curriculum draws."""
    odds_of = CURRICULA[curriculum]
    if odds_of is None:
        return rng.permutation(np.repeat(np.arange(len(left)), left))
    rank = np.arange(len(left))[::-1]  # the last bucket has the shortest
    found = []
    while left.any():
        odds = odds_of(rank) * (left > 0)
        draws = rng.choice(len(left), size=left.sum(), p=odds / odds.sum())
        taken = np.cumsum(draws[:, None] == np.arange(len(left)), axis=0)
        # The odds hold until the draw that empties a bucket.
        emptied = ((taken >= left) & (left > 0)).any(axis=1)
        stop = 1 + int(np.argmax(emptied))
        found.append(draws[:stop])
        left = left - taken[stop - 1]
    return np.concatenate([*found, np.empty(0, int)])


class Batches(Sequence):
    """The endless stream of batches, any of which can be asked for.

    Args:
        source, finish, spec: as `divided` has them.
        augment: on what `source` has, before it is finished; a sequence keeps the place
            that it has without.
        pieces: what `divided` found.
        options: how batches follow one another.
        tokens: of a batch.
        seed: of all that is drawn.
        rows: of a batch of so many sequences, those that are wanted; None: all.
    """

    def __init__(
        self,
        source: Sequence[Example],
        augment: Callable | None,
        finish: Callable | None,
        spec: Spec,
        pieces: Sequence[Pieces],
        options: Options,
        tokens: int,
        seed: int,
        rows: Callable[[int], Sequence[int]] | None = None,
    ):
        sizes = tuple(tokens // bucket.length for bucket in pieces)
        counts = tuple(bucket.count for bucket in pieces)
        self.plan = Plan(counts, sizes, options.curriculum, options.cycles, seed)
        self._rows = [[*range(n)] if rows is None else [*rows(n)] for n in sizes]
        self._streams = []
        for rank, bucket in enumerate(pieces):
            shuffle, augmenting = map(
                int, np.random.SeedSequence((seed, rank)).generate_state(2)
            )
            stream = grain.MapDataset.source(_Read(source, bucket)).shuffle(shuffle)
            stream = stream.repeat(max(1, ENDLESS // bucket.count))
            if augment is not None:
                change = functools.partial(_augmented, augment=augment)
                stream = stream.random_map(change, seed=augmenting)
            cut = functools.partial(
                _cut, finish=finish, length=bucket.length, spec=spec
            )
            self._streams.append(stream.map(cut))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Example:
        return self._batch(*self.plan.find(number))

    def samples(self) -> list[Example]:
        """The first batch of each bucket, the longest first."""
        return [self._batch(bucket, 0) for bucket in range(len(self._streams))]

    def _batch(self, bucket: int, which: int) -> Example:
        start, stream = which * self.plan.sizes[bucket], self._streams[bucket]
        rows = [stream[start + row] for row in self._rows[bucket]]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _Read(Sequence):
    """Random access to the examples that the sequences of a bucket are of."""

    def __init__(self, source: Sequence[Example], pieces: Pieces):
        self._source, self._pieces = source, pieces

    def __len__(self) -> int:
        return self._pieces.count

    def __getitem__(self, index: int) -> Example:
        number = int(self._pieces.numbers[index])
        start = int(self._pieces.starts[index])
        return {"example": self._source[number], "start": start}


def _augmented(piece: Example, rng: np.random.Generator, augment: Callable) -> Example:
    return {**piece, "example": augment(piece["example"], rng)}


def _cut(piece: Example, finish, length: int, spec: Spec) -> Example:
    """The tokens of a sequence; behind the end of its example, masked copies of the
    last."""
    example = piece["example"]
    if finish is not None:
        example = finish(example)
    shape = np.shape(example["mask"])
    axis = len(shape) - 1
    tokens = np.arange(piece["start"], piece["start"] + length)
    there = np.minimum(tokens, shape[axis] - 1)
    whole = () if _by_token(example, spec) else ("targets",)
    cut = {
        key: x if key in whole else np.take(x, there, axis)
        for key, x in example.items()
    }
    cut["mask"] = cut["mask"] & (tokens == there)
    return cut


def line(plan: Plan, pieces: Sequence[Pieces]) -> str:
    """What a run says of its buckets."""
    parts = [
        f"{bucket.count:,} of {bucket.length:,} tokens, {size} in a batch"
        for bucket, size in zip(pieces, plan.sizes, strict=True)
    ]
    return f"buckets: {'; '.join(parts)}; {plan.curriculum}, cycles of {plan.cycles}"
