"""The user's own arrays, from one NPZ or CSV file.

NPZ (`numpy.savez(path, inputs=..., targets=...)`), n sequences of up to L tokens:

    inputs   [n, L] or [n, L, C] numbers, or [n, L] integers: tokens
    targets  [n] integers: the class of each sequence
             [n, L] integers: the class of each token, -1 where there is none
             [n] or [n, K] floats: what to regress per sequence
             [n, L] or [n, L, K] floats: what to regress per token
    mask     [n, L] bool, True where a token is real; or lengths [n]  (optional)
    reset    [n, L] bool, True where the state starts anew             (optional)
    dt       [n, L] floats above 0, time since the token before        (optional)
    split    [n] of "train", "validation", "test"                      (optional)

CSV, separated by commas: one sequence per row, its numbers in time order and then, as
the last cell that is not empty, its target. Rows may differ in length; short ones are
padded on the right. A first row whose last cell is not a number is a header.
"""

import csv
import math
from collections.abc import Sequence

import numpy as np

from train import settings
from train.data import cast, pipeline
from train.data.spec import Spec

KEYS = ("inputs", "targets", "mask", "lengths", "reset", "dt", "split")
ENCODERS = ("scalar", "token")
LOSSES = ("classification", "token", "regression")


def load(
    path: str = "",
    encoder: str = "",
    loss: str = "",
    vocab_size: int = 0,
    outputs: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> pipeline.Dataset:
    """The sequences of one file, divided into train, validation and test.

    Args:
        path: an .npz or .csv file, laid out as this module's docstring says.
        encoder: "scalar" or "token"; "" takes integer inputs of an NPZ as tokens and
            all others as numbers.
        loss: "classification", "token" or "regression"; "" regresses targets that are
            floats, else classifies.
        vocab_size: number of tokens; 0 takes the largest one plus 1.
        outputs: number of classes; 0 takes the largest one plus 1. Regression counts
            its own.
        validation, test: fractions: test of all sequences, validation of the rest.
            Classes keep their proportions. Not read where the file has "split".
        seed: of the division.

    Raises:
        ValueError: a file that cannot be read so; names the file, the key or the row
            and column, what stands there and what may.
    """
    source = File(path, tuple(_READERS))
    source.check_choice("encoder", encoder, ("", *ENCODERS))
    source.check_choice("loss", loss, ("", *LOSSES))
    raw = _READERS[source.path.suffix.lower()](source)
    inputs, vocab_size = _inputs(source, raw["inputs"], encoder, vocab_size)
    mask = _mask(source, raw, inputs.shape[:2])
    targets, outputs, loss = _targets(source, raw["targets"], mask, loss, outputs)
    arrays = {"inputs": inputs, "targets": targets, "mask": mask}
    arrays |= _optional(source, raw, mask)
    if "split" in raw:
        indices = given_split(source, raw["split"])
    else:
        labels = targets if loss == "classification" else None
        indices = drawn_split(source, len(inputs), validation, test, seed, labels)
    spec = Spec(
        encoder="token" if vocab_size else "scalar",
        length=inputs.shape[1],
        channels=inputs.shape[2] if inputs.ndim == 3 else 1,
        vocab_size=vocab_size,
        outputs=outputs,
        loss=loss,
        padded=not mask.all(),
    )
    return pipeline.Dataset(spec, pipeline.split_rows(arrays, indices))


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

    def check_choice(self, name: str, value: str, choices) -> None:
        if value not in choices:
            raise ValueError(
                f"data.{name} must be one of {', '.join(map(repr, choices))}, "
                f"got {value!r}"
            )


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
                "is empty inside the sequence; it may be a number",
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
            f"is {targets[large[0]]:.0f}; a whole number as target may be at most "
            f"{cast.MOST}, and one that is to be regressed may have a decimal point",
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
        raise source.error(where, f"is {cell[:40]!r}; it may be a number") from None
    if not math.isfinite(number):
        raise source.error(where, f"is {cell.strip()[:40]}; it may be a finite number")
    if abs(number) > cast.LARGEST:
        raise source.error(
            where,
            f"is {cell.strip()[:40]}; it may be a number of float32, up to "
            f"{cast.LARGEST:.3g}",
        )
    return number


_READERS = {".npz": _read_npz, ".csv": _read_csv}


def _inputs(source: File, inputs, encoder: str, vocab_size: int):
    """Inputs as float32 or int32, and the vocabulary's size (0 for numbers)."""
    if inputs.ndim not in (2, 3):
        raise source.error(
            "inputs", f"has shape {inputs.shape}; it may be [n, L] or [n, L, C]"
        )
    if 0 in inputs.shape:
        raise source.error(
            "inputs", f"has shape {inputs.shape}; every axis may be 1 or longer"
        )
    if not encoder:
        whole = inputs.dtype.kind in "iu" and inputs.ndim == 2
        encoder = "token" if whole else "scalar"
    if encoder == "scalar":
        return cast.real(f"{source.path}: inputs", inputs), 0
    if inputs.ndim != 2:
        raise source.error("inputs", f"has shape {inputs.shape}; tokens may be [n, L]")
    return source.whole("inputs", inputs, 0, vocab_size)


def _mask(source: File, raw, shape: tuple[int, int]) -> np.ndarray:
    length = shape[1]
    if "mask" in raw:
        mask = _flags(source, "mask", raw["mask"], shape)
    elif "lengths" in raw:
        lengths = raw["lengths"]
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise source.error(
                "lengths",
                f"is {lengths.dtype} {lengths.shape}; it may be integers [n]",
            )
        if lengths.min() < 1 or lengths.max() > length:
            raise source.error(
                "lengths",
                f"lies in [{lengths.min()}, {lengths.max()}]; it may lie in "
                f"[1, {length}]",
            )
        mask = np.arange(length) < lengths[:, None]
    else:
        mask = np.ones(shape, bool)
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise source.error(
            "mask", f"has no True in row {empty[0]}; a sequence needs a real token"
        )
    return mask


def _targets(source: File, targets, mask, loss: str, outputs: int):
    """Targets as int32 or float32, the number of outputs and the loss."""
    if targets.dtype.kind not in "biuf":
        raise source.error("targets", f"is of dtype {targets.dtype}; it may be numbers")
    per_token = targets.shape[1:2] == mask.shape[1:]
    if not loss:
        kinds = {True: "token" if per_token else "classification", False: "regression"}
        loss = kinds[targets.dtype.kind in "iu"]
    if loss == "regression":
        if targets.ndim > (3 if per_token else 2) or 0 in targets.shape:
            raise source.error(
                "targets",
                f"has shape {targets.shape}; a regression's may be [n], [n, K], "
                "[n, L] or [n, L, K]",
            )
        single = targets.ndim == (2 if per_token else 1)
        targets = cast.real(f"{source.path}: targets", targets)
        return targets, 1 if single else targets.shape[-1], loss
    if loss == "token" and targets.shape == mask.shape:
        return *source.whole("targets", targets, -1, outputs, mask), loss
    if loss == "classification" and targets.ndim == 1:
        return *source.whole("targets", targets, 0, outputs), loss
    raise source.error(
        "targets",
        f"is {targets.dtype} {targets.shape}; it may be [n] for the loss "
        "classification, [n, L] for token, and floats for regression",
    )


def _optional(source: File, raw, mask) -> dict[str, np.ndarray]:
    arrays = {}
    if "reset" in raw:
        arrays["reset"] = _flags(source, "reset", raw["reset"], mask.shape)
    if "dt" in raw:
        dt = raw["dt"]
        if dt.shape != mask.shape:
            raise source.error(
                "dt", f"has shape {dt.shape}; it may be [n, L] = {mask.shape}"
            )
        dt = cast.real(f"{source.path}: dt", dt, cast.LEAST, mask)
        arrays["dt"] = np.where(mask, dt, np.float32(1))
    return arrays


def given_split(source: File, split: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, as the key "split" of a file assigns them."""
    unknown = sorted(set(map(str, split.reshape(-1))) - set(pipeline.SPLITS))
    if split.ndim != 1 or unknown:
        raise source.error(
            "split",
            f"is {split.dtype} {split.shape}"
            + (f" with {unknown[0]!r}" if unknown else "")
            + f"; it may be [n] of {', '.join(pipeline.SPLITS)}",
        )
    indices = {name: np.flatnonzero(split == name) for name in pipeline.SPLITS}
    if not len(indices["train"]):
        raise source.error("split", "leaves no sequence to train on")
    return indices


def drawn_split(
    source: File, count: int, validation: float, test: float, seed: int, labels=None
) -> dict[str, np.ndarray]:
    """`pipeline.split_indices`, whose errors name the file."""
    try:
        return pipeline.split_indices(count, validation, test, seed, labels)
    except ValueError as error:
        raise ValueError(
            f"{source.path}: its {count} sequences cannot be divided: {error}; change "
            "data.validation or data.test (0: no such part), or give an NPZ a key split"
        ) from error


def _flags(source: File, key: str, array, shape) -> np.ndarray:
    known = array.dtype.kind in "biuf" and array.shape == shape
    if not known or not np.isin(array, (0, 1)).all():
        raise source.error(
            key,
            f"is {array.dtype} {array.shape}; it may be bool [n, L] = {shape}",
        )
    return array.astype(bool)
