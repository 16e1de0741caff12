"""MNIST and CIFAR-10, pixel by pixel or as images, from their original files.

The published files: https://storage.googleapis.com/cvdf-datasets/mnist (Y. LeCun,
C. Cortes, C. Burges) and https://www.cs.toronto.edu/~kriz/cifar.html (A. Krizhevsky).
A tenth of the training images, drawn with a fixed seed, is for validation.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, original, pipeline
from train.data.original import Original
from train.data.sources import Example, Rows, split_indices, split_rows
from train.data.spec import Spec

CLASSES = 10
VALIDATION, SEED = 0.1, 42

MNIST_SIDE = 28
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist"
MNIST = {
    name: Original(f"{MNIST_URL}/{name}.gz", size, sha256, unpacked=name)
    for name, size, sha256 in (
        (
            "train-images-idx3-ubyte",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
}
PERMUTATIONS = ("none", "bit_reversal", "random")
PERMUTATION_SEED = 92_916

CIFAR_SIDE = 32
CIFAR = Original(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    unpacked=original.CIFAR_FOLDER,
)
CIFAR_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
COLORS = ("rgb", "gray")
# In [0, 1], as https://github.com/state-spaces/s4 has them.
CIFAR_MEAN = {"rgb": (0.4914, 0.4822, 0.4465), "gray": 122.6 / 255}
CIFAR_DEVIATION = {"rgb": (0.247, 0.243, 0.261), "gray": 61.0 / 255}
GRAY = (19_595, 38_470, 7_471)  # / 2^16: ITU-R 601-2, as Pillow computes it


def mnist(
    folder: str = "data/mnist",
    permutation: str = "none",
    download: bool = False,
    layout: str = "sequence",
) -> pipeline.Dataset:
    """MNIST: inputs float32 [784] in [0, 1], targets the digits.

    54,000 images to train on, 6,000 for validation, 10,000 for the test.

    Args:
        folder: with the four files, plain or .gz.
        permutation: one order of the pixels for all images. "none": row by row;
            "bit_reversal": by the reversed 10 bits of an index, those of 784 and more
            left out; "random": as numpy.random.RandomState(92916) shuffles them.
        download: fetch what is missing.
        layout: "sequence", or "image": inputs [28, 28, 1], not permuted.

    Raises:
        ValueError: another permutation or layout; a file that is missing or damaged.
    """
    checks.check_choice("permutation", permutation, PERMUTATIONS)
    mnist_spec(layout)
    if permutation != "none" and layout != "sequence":
        raise ValueError(
            f"data.layout must be sequence with a permutation, got {layout!r}"
        )
    place = settings.place("data.folder", folder)
    paths = original.locate("MNIST", place, tuple(MNIST.values()), download)
    images, labels, test_images, test_labels = _read_mnist(*paths)
    order = _order(permutation, MNIST_SIDE**2)
    return _dataset(
        {"train": (images, labels), "test": (test_images, test_labels)},
        mnist_spec(),
        functools.partial(_mnist_example, order=order),
        layout,
    )


def cifar(
    folder: str = "data/cifar10",
    color: str = "rgb",
    download: bool = False,
    layout: str = "sequence",
) -> pipeline.Dataset:
    """CIFAR-10, row by row, standardised: inputs float32 [1024, 3], or [1024] in gray.

    45,000 images to train on, 5,000 for validation, 10,000 for the test.

    Args:
        folder: with cifar-10-binary.tar.gz or what it unpacks to.
        color: "rgb", or "gray" as in the Long Range Arena.
        download: fetch what is missing.
        layout: "sequence", or "image": inputs [32, 32, 3 or 1].

    Raises:
        ValueError: another color or layout; a file that is missing or damaged.
    """
    cifar_spec(color, layout)
    place = settings.place("data.folder", folder)
    (path,) = original.locate("CIFAR-10", place, (CIFAR,), download)
    return _dataset(
        {
            split: original.read_cifar(path, names)
            for split, names in CIFAR_FILES.items()
        },
        cifar_spec(color),
        _rgb_example if color == "rgb" else _gray_example,
        layout,
    )


def mnist_spec(layout: str = "sequence") -> Spec:
    """What MNIST says of itself, its files there or not; `ValueError` for another
    layout."""
    return _spec(MNIST_SIDE, 1, layout)


def cifar_spec(color: str = "rgb", layout: str = "sequence") -> Spec:
    """What CIFAR-10 says of itself, its files there or not; `ValueError` for another
    color or layout."""
    checks.check_choice("color", color, COLORS)
    return _spec(CIFAR_SIDE, 3 if color == "rgb" else 1, layout)


def _spec(side: int, channels: int, layout: str) -> Spec:
    checks.check_choice("layout", layout, pipeline.LAYOUTS)
    spec = Spec(
        encoder="scalar",
        length=side**2,
        channels=channels,
        vocab_size=0,
        outputs=CLASSES,
        loss="classification",
        padded=False,
    )
    return pipeline.laid_out_spec(spec, layout, (side, side))


def _dataset(splits, spec: Spec, finish, layout: str) -> pipeline.Dataset:
    """Of {"train", "test": (images, labels)}, laid out from the sequences of `spec`."""
    images, labels = splits["train"]
    parts = split_indices(len(labels), VALIDATION, 0.0, SEED)
    sources = split_rows({"image": images, "label": labels}, parts)
    test_images, test_labels = splits["test"]
    sources["test"] = Rows({"image": test_images, "label": test_labels})
    digest = hashlib.sha256()  # of the pixels and labels, packed or not
    for array in (images, labels, test_images, test_labels):
        digest.update(np.ascontiguousarray(array))
    dataset = pipeline.Dataset(spec, sources, finish=finish, digest=digest.hexdigest())
    return pipeline.laid_out(dataset, layout, images.shape[1:3])


def _read_mnist(*paths: Path) -> tuple[np.ndarray, ...]:
    """Images, labels, test images, test labels."""
    arrays = [
        original.read_idx(path, rank)
        for path, rank in zip(paths, (3, 1, 3, 1), strict=True)
    ]
    for i in (0, 2):
        shape = arrays[i].shape
        if shape[1:] != (MNIST_SIDE, MNIST_SIDE):
            raise ValueError(
                f"{paths[i]}: images must have {MNIST_SIDE} x {MNIST_SIDE} pixels, "
                f"these have {shape[1]} x {shape[2]}"
            )
        if len(arrays[i + 1]) != shape[0]:
            raise ValueError(
                f"{paths[i]} has {shape[0]} images, but {paths[i + 1]} has "
                f"{len(arrays[i + 1])} labels"
            )
        if arrays[i + 1].max() >= CLASSES:
            raise ValueError(
                f"{paths[i + 1]}: labels must be 0 to {CLASSES - 1}, one is "
                f"{arrays[i + 1].max()}"
            )
    return tuple(arrays)


def _order(permutation: str, length: int) -> np.ndarray:
    if permutation == "random":
        return np.random.RandomState(PERMUTATION_SEED).permutation(length)
    if permutation == "none":
        return np.arange(length)
    bits = (length - 1).bit_length()
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits)]
    return np.array([i for i in reversed_bits if i < length])


def _mnist_example(example: Example, order: np.ndarray) -> Example:
    pixels = example["image"].reshape(-1)[order]
    return _example(pixels.astype(np.float32) / 255, example)


def _rgb_example(example: Example) -> Example:
    return _standardised(example["image"].reshape(-1, 3), "rgb", example)


def _gray_example(example: Example) -> Example:
    weighted = example["image"].reshape(-1, 3).astype(np.int64) @ np.array(GRAY)
    return _standardised((weighted + 2**15) >> 16, "gray", example)


def _standardised(pixels, color: str, example: Example) -> Example:
    centred = pixels / 255 - np.array(CIFAR_MEAN[color])
    return _example(centred / np.array(CIFAR_DEVIATION[color]), example)


def _example(inputs: np.ndarray, example: Example) -> Example:
    return {
        "inputs": inputs.astype(np.float32),
        "targets": example["label"].astype(np.int32),
        "mask": np.ones(len(inputs), bool),
    }
