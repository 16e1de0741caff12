"""Numbers from a user's file as the arrays of a batch: exact, or refused.

Every reader casts here, so that no number turns into another one in silence: a whole
number stays itself in int32, a float is rounded to the nearest of float32 and never to
an infinity, and a time above 0 stays above it. The messages name where the number
stands and what it must be.
"""

from collections.abc import Mapping

import numpy as np

MOST = 2**31 - 1  # of int32
LARGEST = float(np.finfo(np.float32).max)
LEAST = float(np.finfo(np.float32).tiny)  # smaller ones are 0 on many devices


def real(where: str, array: np.ndarray, least: float = -LARGEST, mask=None):
    """The array as float32.

    Args:
        where: the file and the key, which begin the message.
        array: of any kind of numbers.
        least: the smallest value that it may have.
        mask: bool like the array, True where `least` is asked for; None: everywhere.

    Raises:
        ValueError: what is no number, not finite, beyond float32, or below `least`.
    """
    _check_kind(where, array)
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    bad = ~np.isfinite(numbers)
    if bad.any():
        place = _first(bad)
        if not np.isfinite(array[place]):
            reason = "every value must be finite"
        else:
            reason = f"its numbers must be those of float32, up to {LARGEST:.3g}"
        raise ValueError(f"{where} is {array[place]} at {list(place)}; {reason}")
    if least > -LARGEST:
        # The rounded ones: a float64 may be above 0 where its float32 is not.
        bad = numbers < least if mask is None else mask & (numbers < least)
        if bad.any():
            place = _first(bad)
            raise ValueError(
                f"{where} is {array[place]} at {list(place)}; it must be {least:.3g} "
                "or more"
            )
    return numbers


def whole(where: str, array: np.ndarray, lowest: int, highest: int = MOST, mask=None):
    """The array as int32; -1 where the mask is False.

    Args:
        where: the file and the key, which begin the message.
        array: of any kind of numbers.
        lowest, highest: what it may have.
        mask: bool like the array, True where it counts; None: everywhere.

    Raises:
        ValueError: what is no number, has fractions, or lies outside.
    """
    _check_kind(where, array)
    counts = np.ones(array.shape, bool) if mask is None else mask
    if array.dtype.kind == "f":
        broken = counts & np.isfinite(array) & (array != np.rint(array))
        if broken.any():
            place = _first(broken)
            raise ValueError(
                f"{where} has fractions, {array[place]} at {list(place)}; it must be "
                "whole numbers"
            )
    outside = counts & ~((array >= lowest) & (array <= highest))  # so is NaN
    if outside.any():
        place = _first(outside)
        raise ValueError(
            f"{where} is {array[place]} at {list(place)}; it must lie between {lowest} "
            f"and {highest}"
        )
    if mask is None:
        return array.astype(np.int32)
    return np.where(mask, np.where(mask, array, 0).astype(np.int32), np.int32(-1))


def example(where: str, arrays: Mapping) -> dict:
    """An example, or rows of such, with float32 for float64 and int32 for wider whole
    numbers, which JAX would cast in silence; other arrays stay as they are.

    Args:
        where: what the messages begin with.
        arrays: "inputs", "targets", "mask" (bool), and what else there is, such as
            "dt"; dicts within dicts.

    Raises:
        ValueError: what is no number or beyond float32 or int32, and a "dt" that is not
            above 0 where the mask is True.
    """
    narrow = {}
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            narrow[key] = example(f"{where}: {key}", value)
            continue
        array = np.asarray(value)
        narrow[key] = _narrow(f"{where}: {key}", array)
        if key == "dt":
            mask = np.asarray(arrays.get("mask", True))
            narrow[key] = real(f"{where}: dt", array, LEAST, where_real(mask, array))
    return narrow


def where_real(mask: np.ndarray | None, array: np.ndarray) -> np.ndarray | None:
    """The mask for an array of its shape; None, everywhere, for one of another shape,
    which is refused where the two meet."""
    return mask if mask is not None and mask.shape == array.shape else None


def _narrow(where: str, array: np.ndarray) -> np.ndarray:
    _check_kind(where, array)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if (kind == "i" and size > 4) or (kind == "u" and size >= 4):
        return whole(where, array, -MOST - 1)
    if kind == "f" and size > 4:
        # A NaN that stands for no target stays what it is.
        real(where, np.where(np.isfinite(array), array, 0))
        return array.astype(np.float32)
    return array


def _check_kind(where: str, array: np.ndarray) -> None:
    # bfloat16 is of no kind that NumPy knows
    if array.dtype.kind not in "biuf" and not np.can_cast(array.dtype, np.float32):
        raise ValueError(f"{where} is of dtype {array.dtype}; it must be numbers")


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(int(bad.argmax()), bad.shape)))
