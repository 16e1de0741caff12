"""Clips of video: digits that move, the user's arrays, the user's folders of frames.

A clip of T frames is T - 1 pairs: inputs are the frames 0, ..., T - 2, targets the
frames 1, ..., T - 1, both uint8 [L, h, w, C], or int32 [L, h, w] where a frame is a
grid of codes. With actions, inputs are {"frames": those, "actions": int32 [L]}, the
action at t being the one that leads from frame t to frame t + 1.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from train import settings
from train.data import digits as small_digits
from train.data import images, pipeline
from train.data.arrays import File, drawn_split, given_split, read_npz
from train.data.spec import Spec

GLYPHS = ("digits", "mnist")
GLYPH_IMAGES = {"digits": 1_797, "mnist": 60_000}
TRAIN = 100_000_000  # more than a run reads: no clip comes twice
HELD_OUT = 1_024  # of https://arxiv.org/abs/2310.19694

KEYS = ("frames", "codes", "actions", "split")
CHANNELS = (1, 3)
SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels


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
    pipeline.at_least("length", length, 2, "a frame to see and one to predict")
    pipeline.at_least("digits", digits, 1)
    pipeline.at_least("digit_side", digit_side, 1)
    pipeline.at_least("side", side, digit_side, "data.digit_side")
    pipeline.check_choice("source", source, GLYPHS)
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
    sources = pipeline.drawn_splits(draws, (train, validation, test), seed)
    spec = _pixels((side, side), 1, length)
    finish = functools.partial(_pairs, length=length)
    return pipeline.Dataset(spec, sources, finish=finish)


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
    whole = [parts[split][:]["image"] for split in ("train", "validation")]
    return dict.fromkeys(pipeline.SPLITS, _scaled(np.concatenate(whole), side))


def _scaled(glyphs: np.ndarray, side: int) -> np.ndarray:
    """Images [n, s, s] in [0, 255] as uint8 [n, side, side]."""
    from scipy import ndimage

    if side != glyphs.shape[1]:
        zoom = (1, side / glyphs.shape[1], side / glyphs.shape[2])
        pixels = glyphs.astype(np.float32)
        glyphs = ndimage.zoom(pixels, zoom, mode="grid-constant", grid_mode=True)
    return np.rint(np.clip(glyphs, 0, 255)).astype(np.uint8)


def _moving(rng, glyphs, length, side, digits, step) -> pipeline.Example:
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


def clips(
    path: str = "",
    length: int = 0,
    vocab_size: int = 0,
    actions: int = 0,
    codec: str = "",
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> pipeline.Dataset:
    """n clips from an NPZ, `numpy.savez(path, frames=...)`, which has

        frames   uint8 [n, T, h, w, C], C being 1 or 3, or [n, T, h, w]
        codes    instead: integers [n, T, h, w], a frame being a grid of codes
        actions  integers [n, T], each leading to the frame beside it     (optional)
        split    [n] of "train", "validation", "test"                     (optional)

    The first action of a clip leads to nothing that is predicted: it is not read.

    Args:
        path: of the file.
        length: frames that are taken of a clip: anywhere when training, the first ones
            else. 0: all.
        vocab_size: number of codes; 0 takes the largest one plus 1.
        actions: number of actions; 0: the largest one plus 1 where the file has them.
        codec: workdir of the autoencoder that makes pixels of the codes.
        validation, test: fractions: test of all clips, validation of the rest. Not read
            where the file has "split".
        seed: of the division.

    Raises:
        ValueError: a file that cannot be read so; names the file and the key, what
            stands there and what may.
    """
    source = File(path, (".npz",))
    raw = read_npz(source, KEYS, required=())
    if ("frames" in raw) == ("codes" in raw):
        fault = "and codes are both there" if "frames" in raw else "is missing"
        raise source.error("frames", f"{fault}; the file may have one of frames, codes")
    if "frames" in raw:
        shown, spec = _read_pixels(source, raw["frames"])
        for name, value in (("codec", codec), ("vocab_size", vocab_size)):
            if value:
                raise ValueError(
                    f"data.{name} is about codes, but {source.path} has frames; it may "
                    f"be {type(value)()!r}, got {value!r}"
                )
    else:
        shown, spec = _read_codes(source, raw["codes"], vocab_size)
        spec = spec.but(codec=codec)
    arrays = {"frames": shown}
    count, frames = shown.shape[:2]
    length = length or frames
    if not 2 <= length <= frames:
        raise ValueError(
            f"data.length must lie between 2 and {frames}, the frames of a clip in "
            f"{source.path}, or be 0, got {length}"
        )
    spec = spec.but(length=length - 1)
    if "actions" in raw:
        led = _read_actions(source, raw["actions"], (count, frames), actions)
        arrays["actions"] = led[0]
        spec = spec.but(actions=led[1])
    elif actions:
        raise source.error(
            "actions",
            f"is missing, but data.actions is {actions}; it may be 0, or the file may "
            "have integers [n, T]",
        )
    if "split" in raw:
        indices = given_split(source, raw["split"])
    else:
        indices = drawn_split(source, count, validation, test, seed)
    sources = pipeline.split_rows(arrays, indices)
    window = functools.partial(_window, length=length)
    return pipeline.Dataset(
        spec, sources, window, functools.partial(_pairs, length=length)
    )


def _read_pixels(source: File, shown: np.ndarray):
    """Frames [n, T, h, w, C] and their spec."""
    may = "it may be uint8 [n, T, h, w, C] with 1 or 3 channels C, or [n, T, h, w]"
    if shown.dtype != np.uint8:
        raise source.error("frames", f"is {shown.dtype} {shown.shape}; {may}")
    shape = shown.shape
    if shown.ndim == 4:
        shown = shown[..., None]
    if shown.ndim != 5 or shown.shape[-1] not in CHANNELS:
        raise source.error("frames", f"has shape {shape}; {may}")
    _check_extent(source, "frames", shape)
    return shown, _pixels(shown.shape[2:4], shown.shape[-1])


def _read_codes(source: File, codes: np.ndarray, vocab_size: int):
    """Codes [n, T, h, w] and their spec."""
    if codes.ndim != 4 or codes.dtype.kind not in "iu":
        raise source.error(
            "codes", f"is {codes.dtype} {codes.shape}; it may be integers [n, T, h, w]"
        )
    _check_extent(source, "codes", codes.shape)
    codes, vocab_size = source.whole("codes", codes, 0, vocab_size)
    spec = _pixels(codes.shape[2:], 1)
    return codes, spec.but(vocab_size=vocab_size, outputs=vocab_size, loss="codes")


def _check_extent(source: File, key: str, shape: tuple[int, ...]) -> None:
    if 0 in shape or shape[1] < 2:
        raise source.error(
            key,
            f"has shape {shape}; T may be 2 or more, a frame to see and one to "
            "predict, and every other axis 1 or longer",
        )


def _read_actions(source: File, actions, shape: tuple[int, int], number: int):
    if actions.shape != shape or actions.dtype.kind not in "iu":
        raise source.error(
            "actions",
            f"is {actions.dtype} {actions.shape}; it may be integers [n, T] = {shape}",
        )
    # The first one is not read, so that it may be anything, such as -1.
    read, number = source.whole("actions", actions[:, 1:], 0, number)
    return np.concatenate([np.zeros_like(read[:, :1]), read], axis=1), number


def frames(
    folder: str = "",
    length: int = 20,
    size: tuple[int, ...] = (),
    channels: int = 3,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> pipeline.Dataset:
    """Videos that are folders of PNG or JPEG files, one a frame, read when needed.

    `folder` has one folder per video; or folders "train", and as wanted "validation"
    and "test", which have them. Names are in the order of the numbers in them: 9.png
    comes before 10.png.

    Args:
        folder: of the videos.
        length: frames that are taken of a video: anywhere when training, the first ones
            else.
        size: (h, w) to which frames are scaled; () leaves them, all of one size.
        channels: 3 for colour, 1 for grey.
        validation, test: fractions: test of all videos, validation of the rest. Not
            read where the folders say it.
        seed: of the division.

    Raises:
        ValueError: a folder or file that cannot be read so, which it names; of a frame
            that is not a video's first, when it is read.
    """
    pipeline.at_least("length", length, 2, "a frame to see and one to predict")
    size = tuple(size)
    for n in size:
        settings.check("data.size", n, 0)
    if size and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"data.size must be two pixel counts (h, w) or (), got {size}")
    if channels not in CHANNELS:
        raise ValueError(f"data.channels must be 1 or 3, got {channels}")
    if size:
        taken = length * channels * size[0] * size[1]
        settings.check_memory("data.size", taken, f"a clip of {length} such frames")
    place = settings.place("data.folder", folder)
    if not folder or not place.is_dir():
        raise ValueError(
            "data.folder must name a folder with one folder of PNG or JPEG files per "
            f"video, got {folder!r}"
        )
    sources = {
        split: _Videos([_listed(video, length) for video in videos])
        for split, videos in _divided(place, validation, test, seed).items()
    }
    every = [paths for videos in sources.values() for paths in videos]
    own = size or _read(every[0]["frames"][0], channels).shape[:2]
    read = functools.partial(_read, channels=channels, size=own, scaled=bool(size))
    for paths in every:
        read(paths["frames"][0])
    spec = _pixels(own, channels, length)
    window = functools.partial(_window, length=length)
    finish = functools.partial(_read_pairs, length=length, read=read)
    return pipeline.Dataset(spec, sources, window, finish)


class _Videos:
    """Random access to the frames' paths, as {"frames": (path, ...)}."""

    def __init__(self, videos: list[tuple[str, ...]]):
        self._videos = videos

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index):
        return {"frames": self._videos[index]}


def _divided(place: Path, validation, test, seed) -> dict[str, list[Path]]:
    """split -> folders of videos."""
    found = _folders(place)
    if not found:
        raise ValueError(f"{place}: has no folder; it may have one per video")
    names = [one.name for one in found]
    if "train" in names:
        other = [name for name in names if name not in pipeline.SPLITS]
        if other:
            raise ValueError(
                f"{place / other[0]}: beside a folder train there may be "
                "validation and test, and nothing else"
            )
        parts = {one.name: _folders(one) for one in found}
        empty = [name for name, videos in parts.items() if not videos]
        if empty:
            raise ValueError(
                f"{place / empty[0]}: has no folder; it may have one per video"
            )
        return parts
    try:
        indices = pipeline.split_indices(len(found), validation, test, seed)
    except ValueError as error:
        raise ValueError(
            f"{place}: its {len(found)} videos cannot be divided: {error}; change "
            "data.validation or data.test (0: no such part), or put them into folders "
            "train, validation and test"
        ) from error
    return {
        split: [found[i] for i in rows] for split, rows in indices.items() if len(rows)
    }


def _folders(place: Path) -> list[Path]:
    there = (one for one in place.iterdir() if one.is_dir() and one.name[0] != ".")
    return sorted(there, key=_natural)


def _listed(video: Path, length: int) -> tuple[str, ...]:
    """The paths of a video's frames, in order."""
    there = [
        one
        for one in video.iterdir()
        if one.suffix.lower() in SUFFIXES and one.name[0] != "."
    ]
    if len(there) < length:
        raise ValueError(
            f"{video}: has {len(there)} frames ({', '.join(SUFFIXES)}), fewer than "
            f"data.length, {length}"
        )
    return tuple(str(one) for one in sorted(there, key=_natural))


def _natural(path: Path):
    """Sorts names by the numbers in them."""
    words = re.split(r"(\d+)", path.name, flags=re.ASCII)
    return [int(w) if i % 2 else w for i, w in enumerate(words)], path.name


def _read(path: str, channels: int, size=None, scaled: bool = False) -> np.ndarray:
    """One frame, uint8 [h, w, C]."""
    from PIL import Image  # only needed here

    try:
        with Image.open(path) as image:
            deep = image.mode[:1] in "IF"  # more bits than a channel of a frame has
            mode, image = image.mode, image.convert(MODES[channels])
    except Exception as error:  # OSError, SyntaxError, DecompressionBombError, ...
        raise ValueError(f"{path}: not a readable image ({error})") from error
    if deep:
        raise ValueError(f"{path}: has pixels of mode {mode}; they may have 8 bits")
    if scaled:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    frame = np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
    if size is not None and frame.shape[:2] != tuple(size):
        raise ValueError(
            f"{path}: has {frame.shape[0]} x {frame.shape[1]} pixels, but the first "
            f"video has {size[0]} x {size[1]}; data.size=(h, w) scales all to one size"
        )
    return frame


def _read_pairs(example, length: int, read) -> pipeline.Example:
    shown = [read(path) for path in example["frames"][:length]]
    return _pairs({"frames": np.stack(shown)}, length)


def _window(example, rng: np.random.Generator, length: int):
    """`length` frames from anywhere, and what goes with them."""
    start = rng.integers(len(example["frames"]) - length + 1)
    return {name: values[start : start + length] for name, values in example.items()}


def _pairs(example: pipeline.Example, length: int) -> pipeline.Example:
    """The first `length` frames as inputs and targets."""
    shown = example["frames"][:length]
    inputs = shown[:-1]
    if "actions" in example:
        inputs = {"frames": inputs, "actions": example["actions"][1:length]}
    return {
        "inputs": inputs,
        "targets": shown[1:],
        "mask": np.ones(length - 1, bool),
    }


def whole_clips(batch) -> tuple[np.ndarray, np.ndarray | None]:
    """The clips [B, T, ...] of a batch of pairs, and its actions [B, T - 1] or None."""
    inputs = batch["inputs"]
    given = inputs if isinstance(inputs, Mapping) else {"frames": inputs}
    last = batch["targets"][:, -1:]
    clips = np.concatenate([given["frames"], last], axis=1)
    return clips, given.get("actions")


def _pixels(size: tuple[int, int], channels: int, length: int = 0) -> Spec:
    """The spec of clips of `length` frames."""
    return Spec(
        encoder="video",
        size=tuple(size),
        channels=channels,
        length=length - 1,
        vocab_size=0,
        outputs=channels,
        actions=0,
        loss="frames",
        padded=False,
        causal=True,
    )
