"""Handwritten digits that move and bounce, drawn while they are looked at."""

import functools

import numpy as np

from train import settings
from train.data import checks, images, pipeline
from train.data import digits as small_digits
from train.data.sources import SPLITS, Example, drawn_splits
from train.data.spec import Spec
from train.data.video import pairs, pixels_spec

GLYPHS = ("digits", "mnist")

GLYPH_IMAGES = {"digits": 1_797, "mnist": 60_000}

TRAIN = 100_000_000  # more than a run reads: no clip comes twice

HELD_OUT = 1_024  # of https://arxiv.org/abs/2310.19694


def moving_digits(
    length: int = 20,
    side: int = 64,
    digit_side: int = 28,
    digits: int = 2,
    step: float = 0.15,
    source: str = "digits",
    folder: str = "data/mnist",
    download: bool = False,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """Moving MNIST (https://arxiv.org/abs/1502.04681), drawn on the fly with the motion
    of https://arxiv.org/abs/2310.19694.

    A digit's corner starts uniformly in the unit square, which is where it has room on
    the canvas, and goes `step` a frame in a direction that is uniform on the circle,
    the first time before frame 0. Beyond a wall it is put onto the wall and that
    component of its direction flips. A pixel is the brightest of the digits there.

    Args:
        length: T, frames of a clip, 2 or more.
        side: of the square canvas, in pixels.
        digit_side: of a digit; images of another size are interpolated.
        digits: on the canvas.
        step: in (0, 1].
        source: "mnist": its 60,000 training images, in every split, as published: held
            out are the motions. "digits": the images that scikit-learn ships, of 8 x 8
            pixels; those of a split are of that split of the dataset "digits".
        folder, download: where MNIST is, see the dataset "mnist".
        train, validation, test: numbers of clips; 0: no such split.
        seed: of the data, not of the run.

    Raises:
        ValueError: a setting that cannot be; MNIST is missing or damaged.
    """
    checks.at_least("length", length, 2, "a frame to see and one to predict")
    checks.at_least("digits", digits, 1)
    checks.at_least("digit_side", digit_side, 1)
    checks.at_least("side", side, digit_side, "data.digit_side")
    checks.check_choice("source", source, GLYPHS)
    if not 0 < step <= 1:
        raise ValueError(f"data.step must lie in (0, 1], got {step}")
    settings.check_memory("data.side", length * side**2, f"a clip of {length} frames")
    pixels = GLYPH_IMAGES[source] * digit_side**2
    settings.check_memory("data.digit_side", 4 * pixels, "the digits' images")
    draws = {
        split: functools.partial(
            _moving,
            glyphs=glyphs,
            length=length,
            side=side,
            digits=digits,
            step=step,
        )
        for split, glyphs in _glyphs(source, folder, download, digit_side).items()
    }
    sources = drawn_splits(draws, (train, validation, test), seed)
    finish = functools.partial(pairs, length=length)
    return pipeline.Dataset(spec(length, side), sources, finish=finish)


def spec(length: int = 20, side: int = 64) -> Spec:
    """What the clips say of themselves before one is drawn."""
    return pixels_spec((side, side), 1, length)


def _glyphs(source: str, folder: str, download: bool, side: int):
    """split -> images, uint8 [n, side, side]."""
    if source == "digits":
        parts = small_digits.load().sources
        brightest = small_digits.LEVELS - 1
        return {
            split: _scaled(255 / brightest * rows[:]["image"], side)
            for split, rows in parts.items()
        }
    parts = images.mnist(folder, download=download).sources
    glyphs = [parts[split][:]["image"] for split in ("train", "validation")]
    return dict.fromkeys(SPLITS, _scaled(np.concatenate(glyphs), side))


def _scaled(glyphs: np.ndarray, side: int) -> np.ndarray:
    """Images [n, s, s] in [0, 255] as uint8 [n, side, side]."""
    from scipy import ndimage

    if side != glyphs.shape[1]:
        zoom = (1, side / glyphs.shape[1], side / glyphs.shape[2])
        pixels = glyphs.astype(np.float32)
        glyphs = ndimage.zoom(pixels, zoom, mode="grid-constant", grid_mode=True)
    return np.rint(np.clip(glyphs, 0, 255)).astype(np.uint8)


def _moving(rng, glyphs, length, side, digits, step) -> Example:
    frames = np.zeros((length, side, side, 1), np.uint8)
    size = glyphs.shape[1]
    for _ in range(digits):
        glyph = glyphs[rng.integers(len(glyphs)), ..., None]
        for frame, (x, y) in zip(frames, _path(rng, length, step), strict=True):
            top, left = int(y * (side - size)), int(x * (side - size))
            part = frame[top : top + size, left : left + size]
            np.maximum(part, glyph, out=part)
    return {"frames": frames}


def _path(rng, length, step):
    """Yields (x, y) in the unit square; see `moving_digits`."""
    place = rng.random(2).tolist()
    heading = 2 * np.pi * rng.random()
    pace = [float(step * np.cos(heading)), float(step * np.sin(heading))]
    for _ in range(length):
        for axis in (0, 1):
            place[axis] += pace[axis]
            if not 0 < place[axis] < 1:
                place[axis] = min(max(place[axis], 0.0), 1.0)
                pace[axis] = -pace[axis]
        yield tuple(place)
