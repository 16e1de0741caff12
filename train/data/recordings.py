"""Sequences from a folder of labelled WAV files, one per file.

The label of a file is the name of the folder below the root that it lies in, at any
depth (yes/one.wav), or the beginning of its own name, up to the first "_" or "-"
(7_jackson_32.wav). Where the folders of the root are called train, validation and test,
they are the split, and each of them is a root.

Channels are mixed down to one, whole numbers become those of [-1, 1], and every file is
resampled to one rate.
"""

import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train import settings
from train.data.source_file import RECORDINGS, File
from train.data.sources import SPLITS

LABELS = ("folder", "name")

RATE = "--config.data.rate=8000"


class Recorded(NamedTuple):
    """Recordings that were read.

    Attributes:
        inputs: float32 [n, L], padded on the right.
        lengths: [n], how many samples each has.
        rate: samples per second.
        formats: what the files have, in words, sorted: "int16 PCM", "float32".
    """

    inputs: np.ndarray
    lengths: np.ndarray
    rate: int
    formats: tuple[str, ...]


def read_folder(
    source: File, rate: int, length: int, label: str, one_class: bool = False
) -> dict:
    """inputs [n, L] float32 and, as in an NPZ, lengths, targets (words) and, where the
    folders are splits, split; and, as in `Recorded`, rate and formats.

    Args:
        source: the folder.
        rate: samples per second that every file is resampled to; 0: what they all have.
        length: samples that are kept of the beginning of each, shorter ones being
            padded on the right; 0: all of the longest.
        label: "folder" or "name", where a file's label stands; "": the folder, or the
            name where all files lie in the root itself.
        one_class: whether all may have one label, which teaches nothing.

    Raises:
        ValueError: names the file that cannot be read or has no label, and the cure.
    """
    root = source.path
    paths = _paths(source)
    split = _splits(root, paths)
    insides = [p.relative_to(root).parts[1 if split else 0 :] for p in paths]
    labels = _labels(source, paths, insides, label)
    if len({*labels}) < 2 and not one_class:
        other = "name" if len(insides[0]) > 1 and label != "name" else "folder"
        raise ValueError(
            f"{root}: all {len(paths)} recordings have one class, {labels[0]!r}; there "
            f"must be two or more: --config.data.label={other} takes the label from "
            f"{'the name of the file' if other == 'name' else 'its folder'}"
        )
    recorded = read_all(source, paths, rate, length)
    raw = {key: np.asarray(value) for key, value in recorded._asdict().items()}
    raw["targets"] = np.array(labels)
    if split:
        raw["split"] = np.array(split)
    return raw


def read_unlabelled(source: File, rate: int, length: int) -> Recorded:
    """One WAV file, or all in a folder in the order of their paths; arguments and
    errors as of `read_folder`."""
    paths = _paths(source) if source.path.is_dir() else [source.path]
    return read_all(source, paths, rate, length)


def _paths(source: File) -> list[Path]:
    """All WAV files of the folder that are not hidden, in order."""
    paths = []
    for folder, folders, names in os.walk(source.path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(RECORDINGS) and not name.startswith("."):
                paths.append(Path(folder, name))
    if not paths:
        raise ValueError(
            f"{source.key} must be a file, or a folder of {RECORDINGS} files, got the "
            f"folder {str(source.path)!r}, which has none"
        )
    return sorted(paths)


def _splits(root: Path, paths: Sequence[Path]) -> list[str]:
    """The split of every file; [] where the folders of the root are no splits."""
    tops = [path.relative_to(root).parts for path in paths]
    names = [parts[0] if len(parts) > 1 else "" for parts in tops]
    return names if "train" in names and {*names} <= {*SPLITS} else []


def _labels(source: File, paths, insides, label: str) -> list[str]:
    if not label:
        flat = {len(parts) == 1 for parts in insides}
        if len(flat) > 1:
            where = [len(parts) == 1 for parts in insides]
            cure = source.in_training(
                ", or where the labels stand must be said: --config.data.label=folder "
                "or --config.data.label=name"
            )
            raise ValueError(
                f"{paths[where.index(True)]}: lies in no folder, but "
                f"{paths[where.index(False)]} does; all must, or none{cure}"
            )
        label = "name" if flat.pop() else "folder"
    if label == "folder":
        for path, parts in zip(paths, insides, strict=True):
            if len(parts) == 1:
                cure = source.in_training(
                    ", or --config.data.label=name take the file's name"
                )
                raise ValueError(
                    f"{path}: has no label: it must lie in a folder that is called as "
                    f"its class{cure}"
                )
        return [parts[0] for parts in insides]
    classes = []
    for path in paths:
        name, *others = re.split("[_-]", path.stem, maxsplit=1)
        if not name or not others:
            cure = source.in_training(
                "; or put each class into a folder of its own "
                "(--config.data.label=folder)"
            )
            raise ValueError(
                f"{path}: has no label: its name must begin with the class and _ or -, "
                f"as in yes_1{RECORDINGS}{cure}"
            )
        classes.append(name)
    return classes


def read_all(source: File, paths: Sequence[Path], rate: int, length: int) -> Recorded:
    """The samples of WAV files of a source; arguments and errors as of
    `read_folder`."""
    recordings, formats, total, first = [], set(), 0, 0
    key = source.in_training("data.length") or source.key
    for path in paths:
        samples, own_rate, name = _read(path)
        formats.add(name)
        first = first or own_rate
        if not rate and own_rate != first:
            cure = source.in_training(f": {RATE} resamples all of them to it")
            raise ValueError(
                f"{path}: has {own_rate} samples per second, but {paths[0]} has "
                f"{first}; all must have one rate{cure}"
            )
        if rate and own_rate != rate:
            samples = _resampled(samples, own_rate, rate)
        samples = samples[: length or None].astype(np.float32)
        recordings.append(samples)
        total += samples.nbytes
        settings.check_memory(key, total, "what is kept of the recordings")
    lengths = np.array([len(samples) for samples in recordings])
    width = length or int(lengths.max())
    settings.check_memory(
        key, 4 * width * len(paths), f"{len(paths)} recordings of {width}"
    )
    inputs = np.zeros((len(paths), width), np.float32)
    for row, samples in zip(inputs, recordings, strict=True):
        row[: len(samples)] = samples
    return Recorded(inputs, lengths, rate or first, tuple(sorted(formats)))


def _read(path: Path) -> tuple[np.ndarray, int, str]:
    """Samples [L] in float64, one channel, how many there are per second, and the
    format of the file."""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            rate, samples = wavfile.read(path)
    except Exception as error:  # struct, zero division and many more
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not a readable WAV file ({message}); PCM and floats are read, "
            "which ffmpeg writes: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        ) from error
    # Of chunks that are no samples SciPy warns too; they do no harm.
    if any("EOF prematurely" in str(warning.message) for warning in notes):
        raise ValueError(
            f"{path}: is cut off, shorter than it says itself; copy it again or "
            "remove it"
        )
    if not samples.size or rate < 1:
        raise ValueError(f"{path}: has no samples; remove it")
    numbers = _scaled(samples)
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{path}: has samples that are not finite numbers; write it anew or remove "
            "it"
        )
    mono = numbers if numbers.ndim == 1 else numbers.mean(axis=1)
    return mono, int(rate), _format(samples)


def _format(samples: np.ndarray) -> str:
    name = samples.dtype.name
    if samples.dtype.kind == "f":
        return name
    if name == "int32" and not (samples & 0xFF).any():  # 24 bits in the upper ones
        name = "int24"
    return f"{name} PCM"


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Whole numbers as those of [-1, 1]: bytes lie around 128, others around 0, and
    those of 24 bits are in the upper ones of 32."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float64)
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = half if samples.dtype.kind == "u" else 0.0
    return (samples.astype(np.float64) - middle) / half


def _resampled(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    from scipy import signal  # 0.5 s, only needed here

    common = math.gcd(rate, new_rate)
    return signal.resample_poly(samples, new_rate // common, rate // common)
