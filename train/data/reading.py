"""How a file of the user's was read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is no longer to be seen in the arrays that a model takes.

    Attributes:
        dtype: of the inputs in the file; of recordings, their formats.
        low, high: the least and the largest of their real tokens, as they came.
        why: in words, why they were taken for tokens or for numbers.
        asked: whether the user asked for that, and not the dtype decided it.
        split: "given" by the file, or "drawn".
        warnings: what the order of the file's rows and its targets make one ask.
    """

    dtype: str
    low: float
    high: float
    why: str
    asked: bool
    split: str
    warnings: tuple[str, ...] = ()
