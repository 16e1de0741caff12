"""What is learned from a dataset, where that is not what its targets say."""

import dataclasses

from train.data.pipeline import Dataset
from train.data.spec import Spec


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
