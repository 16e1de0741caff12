"""Random access to examples, and their division into splits."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from train.data.checks import at_least

SPLITS = ("train", "validation", "test")

Example = dict[str, np.ndarray | dict[str, np.ndarray]]


class Rows:
    """Random access to the rows of arrays that share their first axis."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}


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


class Picked:
    """Random access to some examples of a source, those of the `indices`."""

    def __init__(self, source: Sequence[Example], indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index) -> Example:
        return self._source[int(self._indices[index])]


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

    parts, remainder = {}, np.arange(count)
    for name, fraction in (("test", test), ("validation", validation)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be a fraction in [0, 1), got {fraction}")
        parts[name] = remainder[:0]
        if fraction > 0:
            remainder, parts[name] = train_test_split(
                remainder,
                test_size=fraction,
                random_state=seed,
                stratify=None if labels is None else labels[remainder],
            )
    return {"train": remainder, **parts}
