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
from train.data.sources import SPLITS, Rows
from train.data.spec import Spec
from train.data.targets import LOSSES, read_targets

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
        return _images(where, inputs, spec)
    if spec.encoder == "token" and inputs.ndim == 3 and inputs.shape[1] == 2:
        pairs = inputs.reshape(-1, inputs.shape[2])
        return arrays.encoded(where, pairs, spec).reshape(inputs.shape)
    return arrays.encoded(where, inputs, spec)


def _images(where: str, inputs: np.ndarray, spec: Spec) -> np.ndarray:
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
    return recordings.read_all(paths, rate, length)._asdict(), names


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
    options = options._replace(rate=options.rate or spec.rate)
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
        chosen = {name: np.flatnonzero(raw["split"] == name) for name in SPLITS}
    sources = {
        name: Rows({key: array[where] for key, array in rows.items()})
        for name, where in chosen.items()
        if len(where)
    }
    if not sources:
        raise source.error("split", f"must name {', '.join(SPLITS)}; it has none")
    length = values.shape[1] if spec.encoder != "image" else spec.length
    padded = spec.padded or not mask.all()
    return Dataset(spec.but(length=length, padded=padded), sources)


def _targets(source: File, raw: Mapping, spec: Spec, mask, per_token: bool):
    """Targets as the loss of the run takes them."""
    if spec.loss not in LOSSES:
        raise source.error("targets", f"are not for a run of the loss {spec.loss!r}")
    targets, names, outputs, _ = read_targets(source, raw, mask, spec.loss, 0)
    if spec.loss == "regression":
        shape = mask.shape if per_token else mask.shape[:1]
        if outputs != spec.outputs or targets.shape[: len(shape)] != shape:
            raise source.error(
                "targets",
                f"has shape {targets.shape}; the run answers {(*shape, spec.outputs)}",
            )
        return targets
    if names:
        known = _numbers(source, names, spec)
        return np.where(targets < 0, -1, known[targets]).astype(np.int32)
    lowest = -1 if spec.loss == "token" else 0
    return source.whole("targets", targets, lowest, spec.outputs)[0]


def _numbers(source: File, names: tuple[str, ...], spec: Spec) -> np.ndarray:
    """The run's numbers of classes that a file gives by name."""
    numbers = {name: number for number, name in enumerate(spec.classes)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = ", ".join(map(repr, spec.classes[:10])) or "none, only numbers"
        more = ", ..." if len(spec.classes) > 10 else ""
        raise source.error(
            "targets",
            f"has the class {unknown[0]!r:.60}; those of the run are {known}{more}",
        )
    return np.array([numbers[name] for name in names], np.int32)
