"""Some examples of a split, evenly spaced: the first ones may be all of one kind."""

import dataclasses
import math

import numpy as np

from train.data.pipeline import Dataset


class Some:
    """Random access to some of a source's examples."""

    def __init__(self, source, rows: np.ndarray):
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._source[int(self._rows[index])]


def of(dataset: Dataset, split: str, tokens: int, least: int = 1) -> Dataset:
    """The dataset with only as many examples of `split` as have about `tokens` tokens,
    but `least` at least, if there are: the first, the last and some between."""
    source, spec = dataset.sources[split], dataset.spec
    size = spec.size if spec.encoder == "video" else ()
    count = max(least, tokens // math.prod((spec.length, *size)))
    if count >= len(source):
        return dataset
    rows = np.linspace(0, len(source) - 1, count).astype(np.int64)
    return dataclasses.replace(dataset, sources={split: Some(source, rows)})
