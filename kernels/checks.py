"""Argument checks shared by the operations, and the dtype that arguments ask for.

Every message names the argument.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np


def arrays(op: str, allow_empty: bool = False, **arguments) -> None:
    """Each must be an array of JAX or NumPy, with an entry along every axis."""
    for name, array in arguments.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(
                f"{op}: {name} must be an array of jax.numpy or NumPy, got "
                f"{_kind(array)}"
            )
        if not (allow_empty or array.size):
            raise ValueError(
                f"{op}: {name} must be without an empty axis, got shape {array.shape}"
            )


def rows(op: str, **arguments) -> None:
    """Each must be an array whose first axis, the batch, alone may be empty."""
    arrays(op, allow_empty=True, **arguments)
    for name, array in arguments.items():
        if 0 in array.shape[1:]:
            raise ValueError(
                f"{op}: {name} must be without an empty axis, got shape {array.shape}"
            )


def arrays_or_none(op: str, **arguments) -> None:
    """Each must be None or an array; where it may be empty its shape says."""
    present = {name: array for name, array in arguments.items() if array is not None}
    arrays(op, allow_empty=True, **present)


def state_dtype(*arrays) -> jnp.dtype:
    """In which states and sums are kept: the dtype of all floating arrays together,
    float32 or wider; None is left out.

    So one argument of float64 makes the whole call float64, an initial state too.
    """
    dtypes = (x.dtype for x in arrays if x is not None)
    return jnp.result_type(jnp.float32, *dtypes)


def _kind(argument) -> str:
    return "None" if argument is None else f"a {type(argument).__name__}"


def complex(op: str, **arrays) -> None:
    """Each must be complex."""
    for name, array in arrays.items():
        if not jnp.iscomplexobj(array):
            raise ValueError(f"{op}: {name} must be complex, got {array.dtype.name}")


def floating(op: str, real: bool = False, **arrays) -> None:
    """Each array that is not None must be floating point, and real where `real`."""
    for name, array in arrays.items():
        if array is None:
            continue
        kinds = jnp.floating if real else jnp.inexact
        if not jnp.issubdtype(jnp.result_type(array), kinds):
            description = "real floating point" if real else "floating point or complex"
            raise ValueError(
                f"{op}: {name} must be {description}, got {jnp.result_type(array).name}"
            )


def shape(op: str, name: str, array, expected: tuple[int, ...], letters: str) -> None:
    """An array that is not None must be of this shape, which `letters` names."""
    if array is not None and array.shape != expected:
        raise ValueError(
            f"{op}: {name} must be {letters} = {expected}, got {array.shape}"
        )


def sequence(op: str, name: str, array, letters: str, ndim: int | None = None) -> None:
    """`array` starts with [B, L] and has `ndim` axes where given."""
    if array.ndim < 2 or (ndim is not None and array.ndim != ndim):
        raise ValueError(f"{op}: {name} must be {letters}, got shape {array.shape}")


def reset(op: str, array: jax.Array | None, like: jax.Array) -> None:
    """None, or bool [B, L] as the first axes of `like`."""
    if array is None:
        return
    shape(op, "reset", array, like.shape[:2], "[B, L]")
    if array.dtype != jnp.bool_:
        raise ValueError(f"{op}: reset must be bool, got {array.dtype.name}")


def positive(op: str, name: str, value) -> int:
    """The value as an int."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {name} must be an integer >= 1, got {value!r}")
    return operator.index(value)
