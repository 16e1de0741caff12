"""The targets of a user's sequences: classes, by number or by name, or numbers."""

import numpy as np

from train.data import cast
from train.data.source_file import File

LOSSES = ("classification", "token", "regression")

MANY = 16  # classes from which on numbers may have been amounts
FEW = 10  # training sequences of a class that teach little
LEVELS = 10  # values of numbers that may have been classes
REGRESS = "--config.data.loss=regression"
AMOUNTS = f"; amounts are regressed with {REGRESS}"


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
    targets, words = raw["targets"], raw["targets"].dtype.kind in "US"
    if targets.dtype.kind not in "biufUS":
        raise source.error(
            "targets", f"is of dtype {targets.dtype}; it must be numbers or words"
        )
    per_token = targets.shape[1:2] == mask.shape[1:]
    by_dtype = not loss
    if by_dtype:
        kinds = {True: "token" if per_token else "classification", False: "regression"}
        loss = kinds[targets.dtype.kind in "iuUS"]
    if loss == "regression":
        if words or "class_names" in raw:
            fault = "words as targets, which is" if words else "class_names, which are"
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
    targets, names = numbered(source, raw, real)
    if names and outputs not in (0, len(names)):
        raise ValueError(
            f"{source.path}: has names for {len(names)} classes; data.outputs must be "
            f"0 or that, got {outputs}"
        )
    lowest = -1 if loss == "token" else 0
    size = len(names) or outputs
    if lowest == 0 and targets.dtype.kind in "if" and targets.min() < 0:
        row = int(np.argmax(targets < 0))
        raise source.error(
            "targets",
            f"is {targets[row]} at [{row}]; it must lie between 0 and "
            f"{(size or cast.MOST) - 1}: number the classes from 0, or write them as "
            f"words (in an NPZ targets.astype(str)){AMOUNTS if by_dtype else ''}",
        )
    targets, outputs = source.whole("targets", targets, lowest, size, real)
    return targets, names, outputs, loss


def doubts(
    encoder: str,
    targets: np.ndarray,
    names: tuple[str, ...],
    outputs: int,
    loss: str,
    rows: np.ndarray,
) -> list[str]:
    """What makes one ask whether targets are classes or amounts, each with its cure,
    where their dtype alone decided it.

    Args:
        encoder: of the inputs, "token" or "scalar".
        targets, names, outputs, loss: of `read_targets`.
        rows: of the sequences that are trained on.
    """
    if loss == "regression":
        return _levels(targets) if outputs == 1 else []
    # A text leaves out what it will of its vocabulary.
    vocabulary = encoder == loss == "token"
    unused = [] if names or vocabulary else _unused(targets, outputs, loss)
    return unused + (_thin(targets[rows], names) if loss == "classification" else [])


def _levels(targets: np.ndarray) -> list[str]:
    """Of numbers that are few whole values, where classes have that shape."""
    if targets.ndim > 2 or targets.shape[1:] == (1,):
        return []
    if len(np.unique(targets.ravel()[:1000])) > LEVELS:  # all are sorted for long
        return []
    levels = np.unique(targets)
    few = 1 < len(levels) <= min(LEVELS, targets.size // 4)
    if not few or (levels != np.rint(levels)).any():
        return []
    values = ", ".join(f"{level:g}" for level in levels)
    loss = "classification" if targets.ndim == 1 else "token"
    number = ", once they are numbered from 0," if levels[0] < 0 else ""
    return [
        f"the targets are floats of {len(levels)} whole values only ({values}) and "
        f"are regressed; --config.data.loss={loss}{number} takes them for classes"
    ]


def _unused(targets: np.ndarray, outputs: int, loss: str) -> list[str]:
    """Of classes below the largest that no target has."""
    classes = np.unique(targets[targets >= 0])
    unused, lowest = outputs - len(classes), int(classes[0])
    if not unused:
        return []
    if unused == lowest == 1:
        which = "no target is 0, and yet the model has an output for it"
    else:
        which = (
            f"only {len(classes):,} of the {outputs:,} classes from 0 to the largest "
            "target occur, and the model has an output for each"
        )
    ignored = " (-1 is no class of tokens)" if (targets < 0).any() else ""
    amounts = AMOUNTS if len(classes) > MANY else ""
    return [
        f"{which}: number the classes from 0 without gaps{ignored}, or write them as "
        f"words (in an NPZ targets.astype(str)){amounts}"
    ]


def _thin(targets: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Of many classes that have few sequences each."""
    count = len(np.unique(targets))
    if count <= MANY or len(targets) >= FEW * count:
        return []
    cure = "join classes, or bring more sequences"
    if not names:
        cure += f"; amounts (prices, ages) are regressed with {REGRESS}"
    return [
        f"the {len(targets):,} training sequences have {count:,} classes, "
        f"{len(targets) / count:.1f} sequences each in the mean, too few to learn them "
        f"by: {cure}"
    ]


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


def numbered(source: File, raw, real) -> tuple[np.ndarray, tuple[str, ...]]:
    """The targets of a file, words as the numbers of their classes, -1 where there is
    none; and the names of the classes, () where the file has none.

    Args:
        source: of the file.
        raw: its "targets" and "class_names".
        real: True where a target counts; None: everywhere, and none may be empty.

    Raises:
        ValueError: names that cannot be, an empty word, or one that class_names lacks.
    """
    targets, names = raw["targets"], _class_names(source, raw)
    if targets.dtype.kind not in "US":
        return targets, names
    words = _words(source, "targets", targets)
    kinds, numbers = np.unique(words, return_inverse=True)
    numbers, kinds = numbers.reshape(words.shape), kinds.tolist()
    if real is None and "" in kinds:
        row = int(np.argmax(words == ""))
        raise source.error("targets", f"is empty in row {row}; it must name a class")
    there = [name for name in kinds if name]
    if not names:
        integers = all(name.isdecimal() for name in there)
        names = tuple(sorted(there, key=lambda n: (int(n), n)) if integers else there)
    unknown = [name for name in there if name not in names]
    if unknown:
        raise source.error(
            "targets", f"has {unknown[0]!r}, which class_names does not have"
        )
    order = {name: number for number, name in enumerate(names)}
    table = np.array([order.get(name, -1) for name in kinds])
    return table[numbers], names


def _words(source: File, key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "U":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise source.error(key, f"is not UTF-8 ({error}); write it as text") from error
