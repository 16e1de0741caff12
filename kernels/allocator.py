"""Memory that large arrays free stays with the process, on Linux.

The C library gives it back to the system after every operation, and the page faults of
the next one can cost more than its arithmetic. Here it is kept, in one arena for all
threads; the price is that memory.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3) with their numbers in malloc.h and their values.
PARAMETERS = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),  # none has pages of its own, which go back at once
    "M_TRIM_THRESHOLD": (-1, -1),  # nothing is given back
}
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")

_kept = {}


def keep_freed_memory() -> None:
    """Tells the C library so, for this process. For commands: a library leaves it.

    Nothing happens where the environment has a setting of its own (MALLOC_ARENA_MAX and
    others, GLIBC_TUNABLES), or without glibc.
    """
    if sys.platform != "linux" or _variables():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, (number, value) in PARAMETERS.items():
        if mallopt(number, value):
            _kept[name] = value


def setting() -> dict[str, int | str]:
    """What differs from the C library's defaults, for figures that depend on it."""
    return _variables() or dict(_kept)


def _variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
