"""The user's own sequences, from a file or a folder of recordings.

NPZ (`numpy.savez(path, inputs=..., targets=...)`), n sequences of up to L tokens:

    inputs       [n, L] or [n, L, C] numbers, or [n, L] integers: tokens
    targets      [n] integers or words: the class of each sequence
                 [n, L] the same of each token, -1 or "" where there is none
                 [n] or [n, K] floats: what to regress per sequence
                 [n, L] or [n, L, K] floats: what to regress per token
    mask         [n, L] bool, True where a token is real; or lengths [n]  (optional)
    reset        [n, L] bool, True where the state starts anew             (optional)
    dt           [n, L] floats above 0, time since the token before        (optional)
    split        [n] of "train", "validation", "test"                      (optional)
    class_names  [K] words, the names of the classes 0, 1, ...             (optional)

CSV and Parquet: one sequence per row, see `train.data.tables` and `train.data.columns`.
A folder of WAV files: one sequence per file, see `train.data.recordings`.

Words are classes in their sorted order, by value where all are whole numbers, or in
that of class_names.
"""

import dataclasses
import math

import numpy as np

from train.data import cast, checks, own, pipeline, recordings, tables
from train.data.own import (
    FILES,
    Options,
    drawn_split,
    flags,
    given_split,
    mask,
    read,
)
from train.data.reading import Reading
from train.data.source_file import RECORDINGS, File
from train.data.sources import split_rows
from train.data.spec import Spec
from train.data.targets import AMOUNTS, LOSSES, doubts, read_targets

ENCODERS = ("scalar", "token")

BLOCK = 2**20  # numbers that are normalised at once


def load(
    path: str = "",
    encoder: str = "",
    loss: str = "",
    vocab_size: int = 0,
    outputs: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    rate: int = 0,
    length: int = 0,
    label: str = "",
    normalise: bool = False,
) -> pipeline.Dataset:
    """The sequences of one file or folder, divided into train, validation and test.

    Args:
        path: an .npz, .csv or .parquet file, or a folder of .wav files, laid out as
            this module's docstring says.
        encoder: "scalar" or "token"; "" takes integer inputs [n, L] of an NPZ or a
            Parquet file as tokens and all others as numbers.
        loss: "classification", "token" or "regression"; "" regresses targets that are
            floats, else classifies.
        vocab_size: number of tokens; 0 takes the largest one plus 1.
        outputs: number of classes; 0 takes the largest one plus 1, or as many as have
            names. Regression counts its own.
        validation, test: fractions: test of all sequences, validation of the rest.
            Classes keep their proportions. Not read where the file has "split".
        seed: of the division.
        rate: samples per second that recordings are resampled to; 0: what they have.
        length: samples that are taken of a recording; 0: all of the longest.
        label: of recordings, "folder" or "name"; "": the folder, or the name where
            there are no folders.
        normalise: whether numbers have the mean of their channel subtracted and are
            divided by its standard deviation, those of the real tokens of the training
            part. A channel that is constant there keeps its scale.

    Raises:
        ValueError: a file that cannot be read so; names the file, the key or the row
            and column, what stands there and what may.
    """
    source = File(path, FILES, folders=True, content=own.CONTENT)
    checks.check_choice("encoder", encoder, ("", *ENCODERS))
    checks.check_choice("loss", loss, ("", *LOSSES))
    checks.check_choice("label", label, ("", *recordings.LABELS))
    for key, value in (("rate", rate), ("length", length)):
        checks.at_least(key, value, 0)
    raw = read(source, Options(rate, length, label))
    original = raw["inputs"]
    where = f"{source.path}: inputs"
    if 0 in original.shape:
        raise source.error(
            "inputs", f"has shape {original.shape}; every axis must be 1 or longer"
        )
    kind = encoder or _kind(source, original)
    if kind == "token":
        inputs, vocab_size = _tokens(source, original, vocab_size, encoder)
    else:
        inputs, vocab_size = _numbers(where, original), 0
    beside = companions(source, raw, inputs.shape[:2])
    real, by_dtype = beside["mask"], not (loss or outputs)
    targets, names, outputs, loss = read_targets(source, raw, real, loss, outputs)
    if "split" in raw:
        indices = given_split(source, raw["split"])
    else:
        labels = targets if loss == "classification" else None
        amounts = labels is not None and not names and source.kind != RECORDINGS
        cure = AMOUNTS if amounts else ""
        indices = drawn_split(source, len(inputs), validation, test, seed, labels, cure)
    spec = Spec(
        encoder=kind,
        length=inputs.shape[1],
        channels=inputs.shape[2] if inputs.ndim == 3 else 1,
        vocab_size=vocab_size,
        outputs=outputs,
        loss=loss,
        padded=not real.all(),
        classes=names,
        rate=int(raw.get("rate", 0)),
    )
    if normalise and kind == "scalar":
        rows = indices["train"]
        mean, std = fitted(original, real, rows)
        spec = spec.but(mean=mean, std=std)
        inputs = encoded(where, original, spec)
        inputs[~real] = 0
    arrays = {"inputs": inputs, "targets": targets, **beside}
    reading = _reading(source, raw, spec, encoder, real)
    if by_dtype:
        doubtful = doubts(kind, targets, names, outputs, loss, indices["train"])
        warnings = (*reading.warnings, *doubtful)
        reading = dataclasses.replace(reading, warnings=warnings)
    return pipeline.Dataset(spec, split_rows(arrays, indices), reading=reading)


def encoded(where: str, inputs: np.ndarray, spec: Spec) -> np.ndarray:
    """Inputs of a user as a model of these data takes them.

    Args:
        where: the file and the key, which begin the message.
        inputs: [n, L] or [n, L, C] numbers, or [n, L] tokens.
        spec: of the data that the model was trained on.

    Returns:
        int32 [n, L] tokens, or float32 in the shape of `inputs`, normalised where
        `spec` has mean and std. What stands at tokens that are not real should be made
        0 by who knows them.

    Raises:
        ValueError: inputs of another shape, what is no number, or a token that the
            vocabulary does not have.
    """
    if spec.encoder == "token":
        if inputs.ndim != 2:
            raise ValueError(f"{where} has shape {inputs.shape}; tokens must be [n, L]")
        return cast.whole(where, inputs, 0, spec.vocab_size - 1)
    numbers = _numbers(where, inputs)
    channels = inputs.shape[2] if inputs.ndim == 3 else 1
    if channels != spec.channels:
        raise ValueError(
            f"{where} has shape {inputs.shape}, {channels} channels; the model was "
            f"trained on {spec.channels}"
        )
    if not spec.mean:
        return numbers
    mean, std = (np.array(x, np.float64) for x in (spec.mean, spec.std))
    for rows in _blocks(inputs):
        # Of what was given, not of its rounding: an offset may be large.
        block = inputs[rows].reshape(-1, channels).astype(np.float64)
        with np.errstate(over="ignore"):
            scaled = ((block - mean) / std).astype(np.float32)
        bad = ~np.isfinite(scaled)
        if bad.any():
            row, channel = np.argwhere(bad)[0]
            raise ValueError(
                f"{where} has {block[row, channel]:.3g} in channel {channel}, which "
                "normalised is beyond float32: the standard deviation there is "
                f"{std[channel]:.3g}; scale the channel in the file, or train with "
                "--config.data.normalise=False"
            )
        numbers[rows] = scaled.reshape(numbers[rows].shape)
    return numbers


def fitted(
    inputs: np.ndarray, mask: np.ndarray, rows: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel over real tokens; of a constant
    channel its value and 1.

    Args:
        inputs: [n, L] or [n, L, C] finite numbers.
        mask: [n, L], True where a token is real.
        rows: of the sequences that count.
    """
    channels = inputs.shape[2] if inputs.ndim == 3 else 1

    def blocks():
        for part in _blocks(inputs, len(rows)):
            chosen = inputs[rows[part]][mask[rows[part]]]
            yield chosen.reshape(-1, channels).astype(np.float64)

    count, total = 0, np.zeros(channels)
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    for block in blocks():
        count, total = count + len(block), total + block.sum(axis=0)
        low = np.minimum(low, block.min(axis=0, initial=np.inf))
        high = np.maximum(high, block.max(axis=0, initial=-np.inf))
    constant = low == high  # which sums would not tell exactly
    mean = np.where(constant, low, total / count)
    squares = sum(((block - mean) ** 2).sum(axis=0) for block in blocks())
    std = np.sqrt(squares / count)
    std = np.where(constant | (std == 0), 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())


def _blocks(inputs: np.ndarray, count: int | None = None):
    """Slices of rows that have about BLOCK numbers each."""
    count = len(inputs) if count is None else count
    size = max(1, BLOCK // math.prod(inputs.shape[1:]))
    return [slice(i, i + size) for i in range(0, count, size)]


def _numbers(where: str, inputs: np.ndarray) -> np.ndarray:
    if inputs.ndim not in (2, 3):
        raise ValueError(
            f"{where} has shape {inputs.shape}; it must be [n, L] or [n, L, C]"
        )
    return cast.real(where, inputs)


def _kind(source: File, inputs: np.ndarray) -> str:
    integers = inputs.dtype.kind in "iu" and inputs.ndim == 2
    return "token" if integers else "scalar"


def _tokens(source: File, inputs: np.ndarray, vocab_size: int, encoder: str):
    if inputs.ndim != 2:
        raise source.error("inputs", f"has shape {inputs.shape}; tokens must be [n, L]")
    try:
        return source.whole("inputs", inputs, 0, vocab_size)
    except ValueError as error:
        if encoder:
            raise
        raise ValueError(
            f"{error}: integers are taken for tokens, and --config.data.encoder=scalar "
            "reads them as numbers"
        ) from error


def _reading(source: File, raw, spec: Spec, encoder: str, real) -> Reading:
    """What to say of how the file was read."""
    inputs = raw["inputs"]
    low, high = _range(inputs, real)
    dtype = " and ".join(raw.get("formats", [str(inputs.dtype)]))
    warnings = []
    tabular = source.kind in (".csv", ".parquet") and spec.loss != "token"
    if tabular and real.all() and tables.is_one_series(inputs, raw["targets"]):
        warnings.append(
            f"the rows of {source.path.name} follow one another like the moments of "
            "one series, but each is read as a sequence of its own, its columns being "
            "the tokens; forecasting files are not read yet"
        )
    return Reading(
        dtype=dtype,
        low=low,
        high=high,
        why=_why(source, raw, dtype, spec, encoder, f"[{low:.6g}, {high:.6g}]"),
        asked=bool(encoder),
        split="given" if "split" in raw else "drawn",
        warnings=tuple(warnings),
    )


def _range(inputs: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """The least and the largest real number."""
    if inputs.dtype.kind == "b":
        inputs = inputs.view(np.uint8)
    limits = np.iinfo if inputs.dtype.kind in "iu" else np.finfo
    ends = limits(inputs.dtype)
    where = real.reshape(real.shape + (1,) * (inputs.ndim - 2))
    low = np.min(inputs, where=where, initial=ends.max)
    return float(low), float(np.max(inputs, where=where, initial=ends.min))


def _why(source: File, raw, dtype: str, spec: Spec, encoder: str, span: str) -> str:
    """Why the inputs are tokens or numbers, and how they would be the other."""
    inputs, tokens = raw["inputs"], spec.encoder == "token"
    axes = "[n, L]" if inputs.ndim == 2 else "[n, L, C]"
    integers = " integers" if inputs.dtype.kind in "iu" else ""
    values = f"{dtype}{integers} {axes} in {span}"
    if source.kind == RECORDINGS:
        values = f"recordings ({dtype}, {spec.rate:,} Hz) in {span}"
    kind = f"tokens of a vocabulary of {spec.vocab_size:,}" if tokens else "numbers"
    if encoder:
        return f"{values}: read as {kind}, as data.encoder says"
    values = f"{values}: taken as {kind}"
    if tokens:
        return f"{values}; --config.data.encoder=scalar reads them as numbers"
    if source.kind == ".csv":
        return f"{values}; --config.data.encoder=token reads whole ones as tokens"
    return values


def companions(source: File, raw, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The mask and, where a file has them, reset and dt, each [n, L] = `shape`.

    Raises:
        ValueError: one of them is of another shape or type.
    """
    columns = {"mask": mask(source, raw, shape)}
    if "reset" in raw:
        columns["reset"] = flags(source, "reset", raw["reset"], shape)
    if "dt" in raw:
        dt, real = raw["dt"], columns["mask"]
        if dt.shape != shape:
            raise source.error(
                "dt", f"has shape {dt.shape}; it must be [n, L] = {shape}"
            )
        dt = cast.real(f"{source.path}: dt", dt, cast.LEAST, real)
        columns["dt"] = np.where(real, dt, np.float32(1))
    return columns
