"""Handwritten digits read as sequences of 64 pixels: real data that need no download.

The 1,797 images of 8x8 pixels with 17 grey levels that scikit-learn ships (the test
part of https://archive.ics.uci.edu/dataset/80, E. Alpaydin and C. Kaynak, 1998).
"""

import functools

import numpy as np

from train.data import checks, pipeline
from train.data.sources import Example, split_indices, split_rows
from train.data.spec import Spec

SIDE = 8
LENGTH = SIDE * SIDE
LEVELS = 17
START = LEVELS  # the token before the first pixel
CLASSES = 10

# Mean and deviation of the training pixels. Standardised, the background is not 0: a
# token of zeros stays one through a layer without bias, and there the gradient of
# LayerNorm is 1 / sqrt(epsilon), which a stack multiplies.
MEAN, DEVIATION = 4.881, 6.014

TARGETS = ("label", "next")
AUGMENTATIONS = ("none", "shift", "affine")


def load(
    target: str = "label", augment: str = "none", layout: str = "sequence"
) -> pipeline.Dataset:
    """The digits: 1,293 images to train on, 144 for validation, 360 for the test.

    The test part is `train_test_split(test_size=0.2, stratify=labels, random_state=0)`
    of scikit-learn, so that its scores can be compared outside of this repository;
    validation is a tenth of the rest, drawn likewise.

    Args:
        target: "label": inputs are 64 standardised grey values, targets the digits.
            "next": inputs are the tokens START, pixel 0, ..., pixel 62; the targets are
            the pixels 0, ..., 63, each one of 17 grey levels.
        augment: of training images. "none"; "shift": by up to one pixel in each
            direction; "affine": rotation by up to 15 degrees, zoom by up to 10 % and a
            shift by up to one pixel, fractions included.
        layout: of the inputs, for labels only. "sequence", or "image": [8, 8, 1].

    Raises:
        ValueError: another target, augmentation or layout.
    """
    checks.check_choice("target", target, TARGETS)
    checks.check_choice("augment", augment, AUGMENTATIONS)
    checks.check_choice("layout", layout, pipeline.LAYOUTS)
    if target == "next" and layout != "sequence":
        raise ValueError(
            f"data.layout must be sequence for the target next, got {layout!r}"
        )
    images, labels = _read()
    indices = split_indices(len(labels), 0.1, 0.2, seed=0, labels=labels)
    sources = split_rows({"image": images, "label": labels}, indices)
    augmentations = {"none": None, "shift": _shift, "affine": _affine}
    if target == "label":
        spec = Spec("scalar", LENGTH, CLASSES, "classification")
        finish = _label_example
    else:
        spec = Spec(
            "token", LENGTH, LEVELS, "token", vocab_size=LEVELS + 1, causal=True
        )
        finish = _next_example
    dataset = pipeline.Dataset(spec, sources, augmentations[augment], finish)
    return pipeline.laid_out(dataset, layout, (SIDE, SIDE))


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # 0.5 s, only needed here

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int32)


def _label_example(example: Example) -> Example:
    return {
        "inputs": (example["image"].reshape(LENGTH) - np.float32(MEAN)) / DEVIATION,
        "targets": example["label"],
        "mask": np.ones(LENGTH, bool),
    }


def _next_example(example: Example) -> Example:
    # An augmented image has grey values between the levels.
    pixels = np.rint(example["image"]).astype(np.int32).reshape(LENGTH)
    return {
        "inputs": np.concatenate([np.array([START], np.int32), pixels[:-1]]),
        "targets": pixels,
        "mask": np.ones(LENGTH, bool),
    }


def _shift(example: Example, rng: np.random.Generator) -> Example:
    down, right = rng.integers(0, 3, size=2)
    padded = np.pad(example["image"], 1)
    return {**example, "image": padded[down : down + SIDE, right : right + SIDE]}


def _affine(example: Example, rng: np.random.Generator) -> Example:
    from scipy import ndimage

    angle = np.deg2rad(rng.uniform(-15, 15))
    zoom = rng.uniform(0.9, 1.1)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    matrix = np.array([[cos, -sin], [sin, cos]])
    centre = np.full(2, (SIDE - 1) / 2)
    offset = centre - matrix @ (centre + rng.uniform(-1, 1, size=2))
    image = ndimage.affine_transform(example["image"], matrix, offset, order=1)
    return {**example, "image": image}
