"""What is learned from a dataset, where that is not what its targets say."""

import dataclasses

from train.data.pipeline import Dataset


def reconstruction(dataset: Dataset, name: str) -> Dataset:
    """Its inputs are to be reconstructed, its targets are not read.

    Raises:
        ValueError: a dataset that has no frames of pixels.
    """
    if dataset.spec.loss != "frames":
        raise ValueError(
            f"data.reconstruct is for frames of pixels, which the dataset {name!r} "
            "does not have here; it must be False"
        )
    spec = dataset.spec.but(loss="autoencoder", causal=False)
    return dataclasses.replace(dataset, spec=spec)
