"""Files that a trained run has not seen, read as the data it was trained on.

What a run of one's own data (`train.data.arrays`) takes are numbers as they were
brought: its spec says how they were normalised, which classes there are and how many
tokens. Other datasets prepare their numbers in ways of their own, so that a file for
such a run has them as the batches of that dataset do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data import arrays, cast, columns, own, recordings, tables
from train.data.pipeline import Dataset
from train.data.source_file import RECORDINGS, File
from train.data.sources import Rows
from train.data.spec import Spec
from train.data.targets import LOSSES, numbered

COMPANIONS = ("mask", "lengths", "reset", "dt")
OWN = "arrays"  # the dataset that reads files of one's own
EVERY = own.Options()


class Unseen(NamedTuple):
    """Inputs without targets.

    Attributes:
        inputs: as the model takes them, [n, L, ...].
        companions: "mask" and, where the file has them, "reset" and "dt", each [n, L];
            {} for images.
        names: of recordings, their files; else ().
    """

    inputs: np.ndarray
    companions: dict[str, np.ndarray]
    names: tuple[str, ...] = ()


def encoded(where: str, inputs, spec: Spec, dataset: str = OWN) -> np.ndarray:
    """Inputs as the model of a run takes them.

    Args:
        where: what the message of an error begins with.
        inputs: [n, L] or [n, L, C] numbers, [n, L] tokens, or images [n, h, w, C];
            tokens of pairs of documents are [n, 2, L].
        spec: of the run.
        dataset: its data.name.

    Raises:
        ValueError: another shape, tokens beyond the vocabulary, what is no finite
            number, or integers for a dataset that prepares its numbers itself.
    """
    inputs = np.asarray(inputs)
    if 0 in inputs.shape:
        raise ValueError(
            f"{where} has shape {inputs.shape}; every axis must be 1 or longer"
        )
    if spec.encoder == "video":
        raise ValueError(
            f"{where}: a run of frames must be read by train.video.rollout, which "
            "predicts what follows"
        )
    integers = inputs.dtype.kind in "biu"
    if spec.encoder != "token" and dataset != OWN and not spec.mean and integers:
        raise ValueError(
            f"{where} is of dtype {inputs.dtype}; the dataset {dataset!r} prepares its "
            "numbers itself, and they must come as its batches have them, as floats"
        )
    if spec.encoder == "image":
        return _encoded_images(where, inputs, spec)
    if spec.encoder == "token" and inputs.ndim == 3 and inputs.shape[1] == 2:
        pairs = inputs.reshape(-1, inputs.shape[2])
        return arrays.encoded(where, pairs, spec).reshape(inputs.shape)
    return arrays.encoded(where, inputs, spec)


def _encoded_images(where: str, inputs: np.ndarray, spec: Spec) -> np.ndarray:
    shape = (*spec.size, spec.channels)
    if inputs.shape[1:] == spec.size and spec.channels == 1:
        inputs = inputs[..., None]
    if inputs.shape[1:] != shape:
        raise ValueError(
            f"{where} has shape {inputs.shape}; the run reads images "
            f"{['n', *shape]}".replace("'", "")
        )
    return cast.real(where, inputs)


def inputs(
    path: str | Path, spec: Spec, dataset: str = OWN, rate: int = 0, length: int = 0
) -> Unseen:
    """The inputs of a file or of a folder of recordings.

    Args:
        path: NPZ with inputs and, optionally, mask or lengths, reset, dt; CSV or
            Parquet of numbers, a sequence per row and no target; WAV, or a folder with
            such.
        spec, dataset: of the run, see `encoded`.
        rate: that recordings are resampled to; 0: what those of the run have, if it
            has kept that, or none.
        length: longer recordings are cut to so many tokens; 0: none is.

    Raises:
        ValueError: what cannot be read so; names the file, and the key or the row.
    """
    kinds = (*own.FILES, RECORDINGS)
    content = "inputs, one sequence per row"
    source = File(str(path), kinds, folders=True, key="--inputs", content=content)
    names = ()
    match source.kind:
        case ".npz":
            raw = own.read_npz(source, own.KEYS, required=("inputs",))
        case ".csv":
            raw = tables.read_csv_inputs(source)
        case ".parquet":
            raw = columns.read_parquet(source, own.KEYS, targets=False)
        case _:
            raw, names = _recordings(source, rate or spec.rate, length)
    values = encoded(f"{source.path}: inputs", raw["inputs"], spec, dataset)
    return Unseen(values, _companions(source, raw, values, spec), names)


def _companions(source: File, raw: Mapping, inputs: np.ndarray, spec: Spec) -> dict:
    """What of COMPANIONS a file has; images have none."""
    if "mask" in raw and "lengths" in raw:
        raise source.error("lengths", "and mask say the same: give one of them")
    if spec.encoder == "image" or (spec.encoder == "token" and inputs.ndim == 3):
        keys = [key for key in COMPANIONS if key in raw]
        if keys:
            raise source.error(keys[0], "does not go with inputs of that shape")
        return {}
    return arrays.companions(source, raw, inputs.shape[:2])


def _recordings(source: File, rate: int, length: int):
    """inputs and lengths of WAV files, and their names."""
    folder, paths = source.path.parent, [source.path]
    if source.path.is_dir():
        folder = source.path
        paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() == RECORDINGS
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
    if not paths:
        raise ValueError(f"{folder}: has no {RECORDINGS} file")
    names = tuple(str(path.relative_to(folder)) for path in paths)
    return recordings.read_all(source, paths, rate, length)._asdict(), names


def labelled(
    path: str | Path,
    spec: Spec,
    dataset: str = OWN,
    per_token: bool = False,
    options: own.Options = EVERY,
) -> Dataset:
    """Sequences with targets, laid out as `train.data.arrays` says, as the data of a
    run: all of them as the split "test", or those of the splits that the file names.

    Args:
        path: a file or a folder of recordings.
        spec, dataset: of the run, see `encoded`.
        per_token: whether the run answers at every token.
        options: how recordings are read; a rate of 0 is that of the run's recordings.

    Raises:
        ValueError: what the run cannot be scored on: other channels, tokens beyond the
            vocabulary, classes that it does not know.
    """
    source = File(str(path), own.FILES, folders=True, key="--data", content=own.CONTENT)
    options = options._replace(rate=options.rate or spec.rate, one_class=True)
    raw = own.read(source, options if source.kind == RECORDINGS else EVERY)
    values = encoded(f"{source.path}: inputs", raw["inputs"], spec, dataset)
    companions = _companions(source, raw, values, spec)
    mask = companions.pop("mask", None)
    if mask is None:
        places = 2 if spec.encoder == "image" else values.ndim - 1
        mask = np.ones((len(values), *values.shape[1 : 1 + places]), bool)
        mask = mask.reshape(len(values), -1) if spec.encoder == "image" else mask
    rows = {"inputs": values, "mask": mask, **companions}
    rows["targets"] = _targets(source, raw, spec, mask, per_token)
    chosen = {"test": np.arange(len(values))}
    if "split" in raw:
        chosen = own.given_parts(source, raw["split"])
    sources = {
        name: Rows({key: array[where] for key, array in rows.items()})
        for name, where in chosen.items()
        if len(where)
    }
    length = values.shape[1] if spec.encoder != "image" else spec.length
    padded = spec.padded or not mask.all()
    return Dataset(spec.but(length=length, padded=padded), sources)


def _targets(source: File, raw: Mapping, spec: Spec, mask, per_token: bool):
    """Targets as the loss of the run takes them."""
    if spec.loss not in LOSSES:
        raise source.error("targets", f"are not for a run of the loss {spec.loss!r}")
    targets = raw["targets"]
    if spec.loss != "regression":
        shape = mask.shape if spec.loss == "token" else mask.shape[:1]
        shapes, kind = [shape], "a class"
    else:
        shape = mask.shape if per_token else mask.shape[:1]
        shapes, kind = [(*shape, spec.outputs)], "numbers"
        shapes += [shape] if spec.outputs == 1 else []
    if targets.shape not in shapes:
        every = "token" if len(shape) > 1 else "sequence"
        raise source.error(
            "targets",
            f"is {targets.dtype} {targets.shape}; it must be {shapes[0]}: the run "
            f"answers every {every} with {kind}",
        )
    if spec.loss != "regression":
        return _classes(source, raw, spec, mask if spec.loss == "token" else None)
    if targets.dtype.kind in "US" or "class_names" in raw:
        has = "words" if targets.dtype.kind in "US" else "class_names"
        raise source.error("targets", f"has {has}; the run answers with numbers")
    return cast.real(f"{source.path}: targets", targets)


def _classes(source: File, raw: Mapping, spec: Spec, real) -> np.ndarray:
    """Targets as the run numbers its classes; they count where `real`, or everywhere
    where that is None."""
    targets, names = numbered(source, raw, real)
    lowest = 0 if real is None else -1
    if names:
        targets = source.whole("targets", targets, lowest, len(names), real)[0]
        known = _numbers(source, names, spec)
        return np.where(targets < 0, -1, known[targets]).astype(np.int32)
    if any(name.isdecimal() and int(name) != i for i, name in enumerate(spec.classes)):
        raise source.error(
            "targets",
            f"is {targets.dtype}, and the names of the run's classes, "
            f"{_listed(spec.classes)}, are numbers too: write it as words (in an NPZ "
            "targets.astype(str)), or say what it counts in the key class_names",
        )
    try:
        return source.whole("targets", targets, lowest, spec.outputs, real)[0]
    except ValueError as error:
        cure = "leave out sequences of other classes"
        if real is not None:
            cure = "-1 is for a token without a class"
        order = f", in the order {_listed(spec.classes)}" if spec.classes else ""
        raise ValueError(
            f"{error}; the run has {spec.outputs} classes, numbered from 0 as in the "
            f"data that it was trained on{order}: {cure}"
        ) from error


def _numbers(source: File, names: tuple[str, ...], spec: Spec) -> np.ndarray:
    """The run's numbers of classes that a file gives by name."""
    numbers = {name: number for number, name in enumerate(spec.names)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = f"those of the run are {_listed(spec.names)}"
        if not spec.names:
            known = f"those of the run have no names, only 0 to {spec.outputs - 1}"
        raise source.error("targets", f"has the class {unknown[0]!r:.60}; {known}")
    return np.array([numbers[name] for name in names], np.int32)


def _listed(names: tuple[str, ...]) -> str:
    """The first ten of some names."""
    return ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
