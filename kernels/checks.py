"""Argument checks shared by the operations; every message names the argument."""

import jax
import jax.numpy as jnp


def floating(op: str, real: bool = False, **arrays) -> None:
    """Each array that is not None must be floating point, and real where `real`."""
    for name, array in arrays.items():
        if array is None:
            continue
        kinds = jnp.floating if real else jnp.inexact
        if not jnp.issubdtype(jnp.result_type(array), kinds):
            wanted = "real floating point" if real else "floating point or complex"
            raise ValueError(
                f"{op}: {name} must be {wanted}, got {jnp.result_type(array).name}"
            )


def shape(op: str, name: str, array, expected: tuple[int, ...], letters: str) -> None:
    if array is not None and array.shape != expected:
        raise ValueError(
            f"{op}: {name} must be {letters} = {expected}, got {array.shape}"
        )


def sequence(op: str, name: str, array, letters: str, ndim: int | None = None) -> None:
    """`array` starts with [B, L], L >= 1, and has `ndim` axes where given."""
    if array.ndim < 2 or (ndim is not None and array.ndim != ndim):
        raise ValueError(f"{op}: {name} must be {letters}, got shape {array.shape}")
    if array.shape[1] < 1:
        raise ValueError(
            f"{op}: {name} must have length L >= 1, got shape {array.shape}"
        )


def reset(op: str, array: jax.Array | None, like: jax.Array) -> None:
    if array is None:
        return
    shape(op, "reset", array, like.shape[:2], "[B, L]")
    if array.dtype != jnp.bool_:
        raise ValueError(f"{op}: reset must be bool, got {array.dtype.name}")


def positive(op: str, name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {name} must be an integer >= 1, got {value!r}")
