"""The targets of a user's sequences: classes, by number or by name, or numbers."""

import numpy as np

from train.data import cast
from train.data.source_file import File

LOSSES = ("classification", "token", "regression")


def read_targets(source: File, raw, mask: np.ndarray, loss: str, outputs: int):
    """Targets as int32 or float32, the names of the classes, the number of outputs and
    the loss.

    Args:
        source: of the file.
        raw: its "targets", laid out as in `train.data.arrays`, and "class_names".
        mask: [n, L], True where a token is real.
        loss: one of LOSSES; "": by the targets' dtype and shape.
        outputs: number of classes; 0: as many as there are.

    Raises:
        ValueError: names the file, what its targets are and what they must be.
    """
    targets, names = raw["targets"], _class_names(source, raw)
    words = targets.dtype.kind in "US"
    if targets.dtype.kind not in "biufUS":
        raise source.error(
            "targets", f"is of dtype {targets.dtype}; it must be numbers or words"
        )
    per_token = targets.shape[1:2] == mask.shape[1:]
    if not loss:
        kinds = {True: "token" if per_token else "classification", False: "regression"}
        loss = kinds[targets.dtype.kind in "iuUS"]
    if loss == "regression":
        if words or names:
            fault = "class_names, which are" if names else "words as targets, which is"
            raise ValueError(
                f"{source.path}: has {fault} for classes; data.loss must be "
                f"classification or token, or the targets numbers, got {loss!r}"
            )
        return *_regressed(source, targets, per_token), loss
    if (loss, targets.shape) not in (
        ("token", mask.shape),
        ("classification", mask.shape[:1]),
    ):
        raise source.error(
            "targets",
            f"is {targets.dtype} {targets.shape}; it must be [n] for the loss "
            "classification, [n, L] for token, and floats for regression",
        )
    real = mask if loss == "token" else None
    if words:
        targets, names = _numbered(source, targets, names, real)
    if names and outputs not in (0, len(names)):
        raise ValueError(
            f"{source.path}: has names for {len(names)} classes; data.outputs must be "
            f"0 or that, got {outputs}"
        )
    lowest = -1 if loss == "token" else 0
    size = len(names) or outputs
    return *_classes(source, targets, names, lowest, size, real), loss


def _classes(source, targets, names, lowest, size, real):
    targets, outputs = source.whole("targets", targets, lowest, size, real)
    return targets, names, outputs


def _regressed(source: File, targets: np.ndarray, per_token: bool):
    if targets.ndim > (3 if per_token else 2) or 0 in targets.shape:
        raise source.error(
            "targets",
            f"has shape {targets.shape}; a regression's must be [n], [n, K], "
            "[n, L] or [n, L, K]",
        )
    single = targets.ndim == (2 if per_token else 1)
    targets = cast.real(f"{source.path}: targets", targets)
    return targets, (), 1 if single else targets.shape[-1]


def _class_names(source: File, raw) -> tuple[str, ...]:
    """What the key class_names says; () where there is none."""
    if "class_names" not in raw:
        return ()
    names = raw["class_names"]
    if names.ndim != 1 or names.dtype.kind not in "US" or not names.size:
        raise source.error(
            "class_names",
            f"is {names.dtype} {names.shape}; it must be [K] words, one per class",
        )
    names = tuple(_words(source, "class_names", names).tolist())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise source.error("class_names", f"has {twice!r} twice")
    return names


def _numbered(source: File, targets: np.ndarray, names: tuple[str, ...], real):
    """Words as the numbers of their classes, -1 where there is none, and the names."""
    words = _words(source, "targets", targets)
    found, numbers = np.unique(words, return_inverse=True)
    numbers, found = numbers.reshape(words.shape), found.tolist()
    if real is None and "" in found:
        row = int(np.argmax(words == ""))
        raise source.error("targets", f"is empty in row {row}; it must name a class")
    there = [name for name in found if name]
    if not names:
        whole = all(name.isdecimal() for name in there)
        names = tuple(sorted(there, key=lambda n: (int(n), n)) if whole else there)
    unknown = [name for name in there if name not in names]
    if unknown:
        raise source.error(
            "targets", f"has {unknown[0]!r}, which class_names does not have"
        )
    order = {name: number for number, name in enumerate(names)}
    table = np.array([order.get(name, -1) for name in found])
    return table[numbers], names


def _words(source: File, key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "U":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise source.error(key, f"is not UTF-8 ({error}); write it as text") from error
