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

import numpy as np

from train.data import cast, checks, pipeline
from train.data.own import READERS, File, drawn_split, flags, given_split
from train.data.sources import split_rows
from train.data.spec import Spec

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
    source = File(path, tuple(READERS))
    checks.check_choice("encoder", encoder, ("", *ENCODERS))
    checks.check_choice("loss", loss, ("", *LOSSES))
    raw = READERS[source.path.suffix.lower()](source)
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
    return pipeline.Dataset(spec, split_rows(arrays, indices))


def _inputs(source: File, inputs, encoder: str, vocab_size: int):
    """Inputs as float32 or int32, and the vocabulary's size (0 for numbers)."""
    if inputs.ndim not in (2, 3):
        raise source.error(
            "inputs", f"has shape {inputs.shape}; it must be [n, L] or [n, L, C]"
        )
    if 0 in inputs.shape:
        raise source.error(
            "inputs", f"has shape {inputs.shape}; every axis must be 1 or longer"
        )
    if not encoder:
        whole = inputs.dtype.kind in "iu" and inputs.ndim == 2
        encoder = "token" if whole else "scalar"
    if encoder == "scalar":
        return cast.real(f"{source.path}: inputs", inputs), 0
    if inputs.ndim != 2:
        raise source.error("inputs", f"has shape {inputs.shape}; tokens must be [n, L]")
    return source.whole("inputs", inputs, 0, vocab_size)


def encoded(where: str, inputs: np.ndarray, spec: Spec) -> np.ndarray:
    """Inputs as they come from a file, as a model of `spec` takes them: tokens int32,
    numbers float32, normalised where the spec says so.

    Raises:
        ValueError: begins with `where`: tokens beyond the vocabulary, another number of
            channels, what is no finite number.
    """
    if spec.encoder == "token":
        if inputs.ndim != 2:
            raise ValueError(f"{where} has shape {inputs.shape}; tokens must be [n, L]")
        return cast.whole(where, inputs, 0, spec.vocab_size - 1)
    channels = inputs.shape[2] if inputs.ndim == 3 else 1
    if inputs.ndim not in (2, 3) or channels != spec.channels:
        raise ValueError(
            f"{where} has shape {inputs.shape}; the run reads [n, L, {spec.channels}]"
            + (" or [n, L]" if spec.channels == 1 else "")
        )
    found = cast.real(where, inputs)
    if not spec.mean:
        return found
    mean, std = (np.array(x, np.float32) for x in (spec.mean, spec.std))
    scaled = (found.reshape(*found.shape[:2], channels) - mean) / std
    return scaled.reshape(found.shape)


def companions(source: File, raw, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """mask and, where a file has them, reset and dt, each [n, L] = `shape`."""
    mask = _mask(source, raw, shape)
    return {"mask": mask, **_optional(source, raw, mask)}


def _mask(source: File, raw, shape: tuple[int, int]) -> np.ndarray:
    length = shape[1]
    if "mask" in raw:
        mask = flags(source, "mask", raw["mask"], shape)
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
        raise source.error(
            "targets", f"is of dtype {targets.dtype}; it must be numbers"
        )
    per_token = targets.shape[1:2] == mask.shape[1:]
    if not loss:
        kinds = {True: "token" if per_token else "classification", False: "regression"}
        loss = kinds[targets.dtype.kind in "iu"]
    if loss == "regression":
        if targets.ndim > (3 if per_token else 2) or 0 in targets.shape:
            raise source.error(
                "targets",
                f"has shape {targets.shape}; a regression's must be [n], [n, K], "
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
        f"is {targets.dtype} {targets.shape}; it must be [n] for the loss "
        "classification, [n, L] for token, and floats for regression",
    )


def _optional(source: File, raw, mask) -> dict[str, np.ndarray]:
    arrays = {}
    if "reset" in raw:
        arrays["reset"] = flags(source, "reset", raw["reset"], mask.shape)
    if "dt" in raw:
        dt = raw["dt"]
        if dt.shape != mask.shape:
            raise source.error(
                "dt", f"has shape {dt.shape}; it must be [n, L] = {mask.shape}"
            )
        dt = cast.real(f"{source.path}: dt", dt, cast.LEAST, mask)
        arrays["dt"] = np.where(mask, dt, np.float32(1))
    return arrays
