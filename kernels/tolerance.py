"""The one table of numerical tolerances, and the comparison that uses it.

The error of a tensor is max|actual - expected| / max|expected|: relative to the largest
entry, so that entries that cancel to nearly nothing are not judged by their own size.
"""

import jax
import jax.numpy as jnp
import numpy as np

LIMITS = {
    "float64": {"value": 1e-11, "gradient": 1e-10},
    "float32": {"value": 2e-5, "gradient": 1e-4},
    "bfloat16": {"value": 2e-2, "gradient": 5e-2},
}
LIMITS["complex128"] = LIMITS["float64"]
LIMITS["complex64"] = LIMITS["float32"]
EXACT = ("bool", "int32")


def limit(dtype, kind: str = "value") -> float:
    """The largest error allowed for results computed from inputs of `dtype`: none for
    counts and flags."""
    name = jnp.dtype(dtype).name
    if name in EXACT:
        return 0.0
    if name not in LIMITS:
        raise ValueError(f"dtype must be one of {', '.join(LIMITS)}, got {name}")
    if kind not in LIMITS[name]:
        raise ValueError(f"kind must be 'value' or 'gradient', got {kind!r}")
    return LIMITS[name][kind]


def error(actual, expected) -> float:
    """max|actual - expected| / max|expected|, absolute where expected is all zero.

    A different shape or a value that is not finite is an infinite error.
    """
    actual, expected = _wide(actual), _wide(expected)
    if actual.shape != expected.shape:
        return float("inf")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    if actual.size == 0:
        return 0.0
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale if scale > 0 else 1.0))


def assert_close(actual, expected, kind: str = "value", dtype=None) -> None:
    """Raises AssertionError naming every leaf of `actual` that is off `expected`.

    Args:
        actual, expected: pytrees of one structure.
        kind: "value" or "gradient", a column of LIMITS.
        dtype: the row of LIMITS; None takes each actual leaf's own dtype. Pass it where
            low-precision inputs produce a float32 result.
    """
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    if actual_tree != expected_tree:
        raise AssertionError(f"structures differ: {actual_tree} and {expected_tree}")
    failures = []
    for (path, leaf), target in zip(actual_leaves, expected_leaves, strict=True):
        bound = limit(np.asarray(leaf).dtype if dtype is None else dtype, kind)
        deviation = error(leaf, target)
        if not deviation <= bound:
            name = jax.tree_util.keystr(path) or "value"
            note = ""
            if np.shape(leaf) != np.shape(target):
                note = f" (shapes {np.shape(leaf)} and {np.shape(target)})"
            failures.append(f"{name}: error {deviation:.3g}, limit {bound:.3g}{note}")
    if failures:
        raise AssertionError(f"{kind} not close:\n  " + "\n  ".join(failures))


def _wide(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
