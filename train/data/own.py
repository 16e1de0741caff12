"""Files of the user, and errors that name the file and the key."""

import csv
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from train import settings
from train.data import cast, sources

KEYS = ("inputs", "targets", "mask", "lengths", "reset", "dt", "split")


class File:
    """The path of a file that ends in one of `suffixes`, and errors that name it."""

    def __init__(self, path: str, suffixes: Sequence[str]):
        if not path:
            raise ValueError(
                f"data.path must name an {' or '.join(suffixes)} file, such as "
                "--config.data.path=my.npz; it is empty"
            )
        self.path = settings.place("data.path", path)
        if self.path.suffix.lower() not in suffixes:
            raise ValueError(
                f"data.path must end in {' or '.join(suffixes)}, got {path!r}"
            )
        if not self.path.is_file():
            if self.path.exists():
                raise ValueError(f"data.path must be a file, got the folder {path!r}")
            raise ValueError(f"data.path: there is no file {path!r}")

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{self.path}: {key} {message}")

    def whole(self, key: str, array, lowest: int, size: int, mask=None):
        """The array as int32 in [lowest, size), -1 where the mask is False, and size,
        which 0 leaves to the array."""
        highest = (size or cast.MOST) - 1
        found = cast.whole(f"{self.path}: {key}", array, lowest, highest, mask)
        if found.max() < 0:
            raise self.error(key, "has no class at all, only -1")
        return found, size or int(found.max()) + 1


def read_npz(
    source: File, keys: Sequence[str], required: Sequence[str]
) -> dict[str, np.ndarray]:
    """The arrays of an NPZ, which share their first axis.

    Args:
        source: of the file.
        keys: what it may have.
        required: the ones it must have.

    Raises:
        ValueError: another file; names the key that does not fit.
    """
    try:
        # np.load leaves a file that it opened itself open when it is damaged.
        with open(source.path, "rb") as data, np.load(data, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            settings.check_memory("data.path", size, f"{source.path}, unpacked,")
            raw = {key: np.asanyarray(file[key]) for key in file.files}
    except Exception as error:  # zipfile, zlib, header and pickle errors share no class
        raise ValueError(
            f"{source.path}: not a readable NPZ of plain arrays ({error}); write it "
            "with numpy.savez, every key an array of numbers"
        ) from error
    missing = [key for key in required if key not in raw]
    if missing:
        raise source.error(
            missing[0], f"is missing; the file has {', '.join(raw) or 'no key'}"
        )
    unknown = [key for key in raw if key not in keys]
    if unknown:
        raise source.error(unknown[0], f"is no known key; those are {', '.join(keys)}")
    first = next((key for key in keys if key in raw), "")
    count = len(np.atleast_1d(raw.get(first, ())))
    for key, array in raw.items():
        if array.ndim == 0 or len(array) != count:
            raise source.error(
                key,
                f"has shape {array.shape}, but {first} has {count} sequences on its "
                "first axis",
            )
    return raw


def _read_npz(source: File) -> dict[str, np.ndarray]:
    raw = read_npz(source, KEYS, required=("inputs", "targets"))
    if "mask" in raw and "lengths" in raw:
        raise source.error("lengths", "and mask say the same: give one of them")
    return raw


def _read_csv(source: File) -> dict[str, np.ndarray]:
    rows, targets, written, places = [], [], [], []
    for line, cells in _csv_lines(source):
        *sequence, target = cells
        rows.append([_number(source, line, i, cell) for i, cell in enumerate(sequence)])
        targets.append(_number(source, line, len(sequence), target))
        written.append(target)
        places.append(f"row {line}, column {len(sequence) + 1}")
        while rows[-1] and rows[-1][-1] is None:  # a spreadsheet's filling
            rows[-1].pop()
        if None in rows[-1]:
            raise source.error(
                f"row {line}, column {rows[-1].index(None) + 1}",
                "is empty inside the sequence; it must be a number",
            )
        if not rows[-1]:
            raise source.error(
                f"row {line}", "needs at least one input before its target"
            )
    if not rows:
        raise ValueError(f"{source.path}: has no sequence")
    lengths = np.array([len(row) for row in rows])
    inputs = np.zeros((len(rows), lengths.max()))
    for row, numbers in zip(inputs, rows, strict=True):
        row[: len(numbers)] = numbers
    targets = np.array(targets)
    if all(cell.strip().lstrip("+-").isdigit() for cell in written):
        targets = _labels(source, targets, places)
    return {"inputs": inputs, "targets": targets, "lengths": lengths}


def _labels(source: File, targets: np.ndarray, places: list[str]) -> np.ndarray:
    """Whole targets of a CSV as integers: classes, unless data.loss says other."""
    large = np.flatnonzero(abs(targets) > cast.MOST)
    if len(large):
        raise source.error(
            places[large[0]],
            f"is {targets[large[0]]:.0f}; a whole number as target must be at most "
            f"{cast.MOST}, and one that is to be regressed must have a decimal point",
        )
    return targets.astype(np.int64)


def _csv_lines(source: File):
    """Yields (row number from 1, cells up to the last that is not empty)."""
    try:
        with open(source.path, newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                while cells and not cells[-1].strip():
                    cells.pop()
                if cells and not (line == 1 and _is_header(cells)):
                    yield line, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source.path}: not a UTF-8 CSV file ({error})") from error


def _is_header(cells: list[str]) -> bool:
    try:
        float(cells[-1])
    except ValueError:
        return True
    return False


def _number(source: File, line: int, column: int, cell: str) -> float | None:
    if not cell.strip():
        return None
    where = f"row {line}, column {column + 1}"
    try:
        number = float(cell)
    except ValueError:
        raise source.error(where, f"is {cell[:40]!r}; it must be a number") from None
    if not math.isfinite(number):
        raise source.error(where, f"is {cell.strip()[:40]}; it must be a finite number")
    if abs(number) > cast.LARGEST:
        raise source.error(
            where,
            f"is {cell.strip()[:40]}; it must be a number of float32, up to "
            f"{cast.LARGEST:.3g}",
        )
    return number


READERS = {".npz": _read_npz, ".csv": _read_csv}


def given_split(source: File, split: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, as the key "split" of a file assigns them."""
    unknown = sorted(set(map(str, split.reshape(-1))) - set(sources.SPLITS))
    if split.ndim != 1 or unknown:
        raise source.error(
            "split",
            f"is {split.dtype} {split.shape}"
            + (f" with {unknown[0]!r}" if unknown else "")
            + f"; it must be [n] of {', '.join(sources.SPLITS)}",
        )
    indices = {name: np.flatnonzero(split == name) for name in sources.SPLITS}
    if not len(indices["train"]):
        raise source.error("split", "leaves no sequence to train on")
    return indices


def drawn_split(
    source: File, count: int, validation: float, test: float, seed: int, labels=None
) -> dict[str, np.ndarray]:
    """`sources.split_indices`, whose errors name the file."""
    try:
        return sources.split_indices(count, validation, test, seed, labels)
    except ValueError as error:
        raise ValueError(
            f"{source.path}: its {count} sequences cannot be divided: {error}; change "
            "data.validation or data.test (0: no such part), or give an NPZ a key split"
        ) from error


def flags(source: File, key: str, array, shape) -> np.ndarray:
    known = array.dtype.kind in "biuf" and array.shape == shape
    if not known or not np.isin(array, (0, 1)).all():
        raise source.error(
            key,
            f"is {array.dtype} {array.shape}; it must be bool [n, L] = {shape}",
        )
    return array.astype(bool)


def read_inputs(path: Path, rate: int = 0, length: int = 0) -> np.ndarray:
    """The inputs [1, L] of one WAV file, as numbers from -1 to 1.

    Args:
        path: of the file.
        rate: samples per second to have; 0: the file's.
        length: samples to have, cut or padded; 0: the file's.

    Raises:
        ValueError: the file cannot be read so.
    """
    try:
        there, samples = wavfile.read(path)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a readable WAV file ({error})") from error
    if rate not in (0, there):
        raise ValueError(f"{path}: must have {rate} samples per second, has {there}")
    if samples.dtype.kind in "iu":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    samples = samples if samples.ndim == 1 else samples.mean(axis=1)
    if length:
        samples = np.pad(samples, (0, max(0, length - len(samples))))[:length]
    return samples[None].astype(np.float32)
