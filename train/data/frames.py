"""Videos as folders of images, one folder a video."""

import functools
import re
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, pipeline
from train.data.sources import SPLITS, Example, split_indices
from train.data.spec import Spec
from train.data.video import CHANNELS, pairs, pixels_spec, window_of

SUFFIXES = (".png", ".jpg", ".jpeg")

MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels


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
    checks.at_least("length", length, 2, "a frame to see and one to predict")
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
    own = size or read_image(every[0]["frames"][0], channels).shape[:2]
    read = functools.partial(read_image, channels=channels, size=own, scaled=bool(size))
    for paths in every:
        read(paths["frames"][0])
    window = functools.partial(window_of, length=length)
    finish = functools.partial(_read_pairs, length=length, read=read)
    return pipeline.Dataset(spec(length, own, channels), sources, window, finish)


def spec(
    length: int = 20, size: tuple[int, ...] = (), channels: int = 3
) -> Spec | None:
    """What the clips say of themselves without their folder; None where frames are as
    large as their files."""
    return pixels_spec(tuple(size), channels, length) if len(size) == 2 else None


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
    folders = _folders(place)
    if not folders:
        raise ValueError(f"{place}: has no folder; it must have one per video")
    names = [one.name for one in folders]
    if "train" in names:
        other = [name for name in names if name not in SPLITS]
        if other:
            raise ValueError(
                f"{place / other[0]}: beside a folder train there may be "
                "validation and test, and nothing else"
            )
        parts = {one.name: _folders(one) for one in folders}
        empty = [name for name, videos in parts.items() if not videos]
        if empty:
            raise ValueError(
                f"{place / empty[0]}: has no folder; it must have one per video"
            )
        return parts
    try:
        indices = split_indices(len(folders), validation, test, seed)
    except ValueError as error:
        raise ValueError(
            f"{place}: its {len(folders)} videos cannot be divided: {error}; change "
            "data.validation or data.test (0: no such part), or put them into folders "
            "train, validation and test"
        ) from error
    return {
        split: [folders[i] for i in rows]
        for split, rows in indices.items()
        if len(rows)
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


def read_image(path: str, channels: int, size=None, scaled: bool = False) -> np.ndarray:
    """One frame, uint8 [h, w, C]."""
    from PIL import Image  # only needed here

    try:
        with Image.open(path) as image:
            deep = image.mode[:1] in "IF"  # more bits than a channel of a frame has
            mode, image = image.mode, image.convert(MODES[channels])
    except Exception as error:  # OSError, SyntaxError, DecompressionBombError, ...
        raise ValueError(f"{path}: not a readable image ({error})") from error
    if deep:
        raise ValueError(f"{path}: has pixels of mode {mode}; they must have 8 bits")
    if scaled:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    frame = np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
    if size is not None and frame.shape[:2] != tuple(size):
        raise ValueError(
            f"{path}: has {frame.shape[0]} x {frame.shape[1]} pixels, but the first "
            f"video has {size[0]} x {size[1]}; data.size=(h, w) scales all to one size"
        )
    return frame


def _read_pairs(example, length: int, read) -> Example:
    frames = [read(path) for path in example["frames"][:length]]
    return pairs({"frames": np.stack(frames)}, length)
