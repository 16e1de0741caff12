"""Files of the user by their kind: what they hold, as arrays by key.

NPZ here, CSV in `train.data.tables`, Parquet in `train.data.columns`, WAV in
`train.data.recordings`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train import settings
from train.data import columns, recordings, sources, tables
from train.data.source_file import RECORDINGS, File

KEYS = (
    "inputs",
    "targets",
    "mask",
    "lengths",
    "reset",
    "dt",
    "split",
    "class_names",
)
CONTENT = "inputs and targets, one sequence per row"
# Of the classes, not of the sequences.
OTHER_AXIS = ("class_names",)


class Options(NamedTuple):
    """What is asked of recordings, as `recordings.read_folder` takes it."""

    rate: int = 0
    length: int = 0
    label: str = ""
    one_class: bool = False


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
            settings.check_memory(source.key, size, f"{source.path}, unpacked,")
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
        if key in OTHER_AXIS:
            continue
        if array.ndim == 0 or len(array) != count:
            raise source.error(
                key,
                f"has shape {array.shape}, but {first} has {count} sequences on its "
                "first axis",
            )
    return raw


def _read_npz(source: File, options: Options) -> dict[str, np.ndarray]:
    raw = read_npz(source, KEYS, required=("inputs", "targets"))
    return _one_mask(source, raw)


def _one_mask(source: File, raw: dict) -> dict[str, np.ndarray]:
    if "mask" in raw and "lengths" in raw:
        raise source.error("lengths", "and mask say the same: give one of them")
    return raw


def _read_parquet(source: File, options: Options) -> dict[str, np.ndarray]:
    raw = columns.read_parquet(source, KEYS)
    if "targets" not in raw:
        raise source.error("column 'targets'", f"is missing; there are {[*raw]}")
    return _one_mask(source, raw)


READERS: dict[str, Callable[[File, Options], dict[str, np.ndarray]]] = {
    ".npz": _read_npz,
    ".csv": lambda source, options: tables.read_csv(source),
    ".parquet": _read_parquet,
    RECORDINGS: lambda source, options: recordings.read_folder(source, *options),
}
FILES = tuple(kind for kind in READERS if kind != RECORDINGS)


def read(source: File, options: Options) -> dict[str, np.ndarray]:
    """What a file or a folder of recordings holds, by key, as an NPZ has it.

    Raises:
        ValueError: names the file, what is wrong with it and the cure; or an option
            that is for recordings only.
    """
    if source.kind != RECORDINGS:
        for key, value in options._asdict().items():
            if value:
                raise ValueError(
                    f"data.{key} is for a folder of {RECORDINGS} files, and data.path "
                    f"is {source.path}; it must be {type(value)()!r}, got {value!r}"
                )
    return READERS[source.kind](source, options)


def read_inputs(path: str | Path, rate: int = 0, length: int = 0) -> np.ndarray:
    """The inputs of a file without targets, [n, L] or [n, L, C], as they are there.

    Args:
        path: an .npz (its key inputs), .csv (numbers alone), .parquet, .wav, or a
            folder of WAV files, in the order of their paths.
        rate, length: of recordings, see `recordings.read_folder`; other files have
            neither.

    Raises:
        ValueError: as `read`.
    """
    return read_sequences(path, rate, length)[0]


def read_sequences(
    path: str | Path, rate: int = 0, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`read_inputs` and the mask [n, L], True where a token is real: what a file pads
    is not."""
    kinds = (*FILES, RECORDINGS)
    content = "inputs, one sequence per row"
    source = File(str(path), kinds, folders=True, key="inputs", content=content)
    raw = {}
    match source.kind:
        case ".npz":
            raw = read_npz(source, KEYS, required=("inputs",))
        case ".csv":
            raw = tables.read_csv_inputs(source)
        case ".parquet":
            raw = columns.read_parquet(source, KEYS, targets=False)
        case _:
            raw = recordings.read_unlabelled(source, rate, length)._asdict()
    inputs = raw["inputs"]
    if inputs.ndim not in (2, 3) or 0 in inputs.shape:
        raise source.error(
            "inputs", f"has shape {inputs.shape}; it must be [n, L] or [n, L, C]"
        )
    return inputs, mask(source, raw, inputs.shape[:2])


def mask(source: File, raw: dict, shape: tuple[int, int]) -> np.ndarray:
    """The mask [n, L] of what has "mask", "lengths" or neither.

    Raises:
        ValueError: it is of another shape, or a sequence has no real token.
    """
    length = shape[1]
    if "mask" in raw:
        real = flags(source, "mask", raw["mask"], shape)
    elif "lengths" in raw:
        lengths = raw["lengths"]
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise source.error(
                "lengths",
                f"is {lengths.dtype} {lengths.shape}; it must be integers [n]",
            )
        if lengths.min() < 1 or lengths.max() > length:
            raise source.error(
                "lengths",
                f"lies in [{lengths.min()}, {lengths.max()}]; it must lie in "
                f"[1, {length}]",
            )
        real = np.arange(length) < lengths[:, None]
    else:
        real = np.ones(shape, bool)
    empty = np.flatnonzero(~real.any(axis=1))
    if len(empty):
        raise source.error(
            "mask", f"has no True in row {empty[0]}; a sequence needs a real token"
        )
    return real


def given_split(source: File, split: np.ndarray) -> dict[str, np.ndarray]:
    """`given_parts`, of which one must be there to train on."""
    indices = given_parts(source, split)
    if not len(indices["train"]):
        raise source.error("split", "leaves no sequence to train on")
    return indices


def given_parts(source: File, split: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, as the key "split" of a file assigns them."""
    unknown = sorted(set(map(str, split.reshape(-1))) - set(sources.SPLITS))
    if split.ndim != 1 or unknown:
        raise source.error(
            "split",
            f"is {split.dtype} {split.shape}"
            + (f" with {unknown[0]!r}" if unknown else "")
            + f"; it must be [n] of {', '.join(sources.SPLITS)}",
        )
    return {name: np.flatnonzero(split == name) for name in sources.SPLITS}


def drawn_split(
    source: File,
    count: int,
    validation: float,
    test: float,
    seed: int,
    labels=None,
    cure: str = "",
) -> dict[str, np.ndarray]:
    """`sources.split_indices`, whose errors name the file; `cure` ends them."""
    try:
        return sources.split_indices(count, validation, test, seed, labels)
    except ValueError as error:
        raise ValueError(
            f"{source.path}: its {count} sequences cannot be divided: {error}; change "
            "data.validation or data.test (0: no such part), or say the split: an NPZ "
            "in its key split, recordings in folders train, validation and test"
            f"{cure}"
        ) from error


def flags(source: File, key: str, array, shape) -> np.ndarray:
    known = array.dtype.kind in "biuf" and array.shape == shape
    if not known or not np.isin(array, (0, 1)).all():
        raise source.error(
            key,
            f"is {array.dtype} {array.shape}; it must be bool [n, L] = {shape}",
        )
    return array.astype(bool)
