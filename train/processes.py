"""What the processes of one run tell one another."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from train import lock


def from_the_first(decision: dict) -> dict:
    """The decision of process 0, which JSON can hold, in all processes."""
    if jax.process_count() == 1:
        return decision
    text = np.frombuffer(json.dumps(decision).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    padded[: text.size] = text[:size]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


@contextlib.contextmanager
def held(workdir: str | Path) -> Iterator[lock.Lock]:
    """Holds `workdir` for this run: process 0 for all, who learn what came of it.

    Raises:
        ValueError: another run has it, or `workdir` cannot be written.
        OSError: the disk is full; in the other processes that is a `ValueError` too.
    """
    with contextlib.ExitStack() as leaving:
        handle, refusal = lock.Lock(), None
        if jax.process_index() == 0:
            try:
                handle = leaving.enter_context(lock.held(workdir))
            except (ValueError, OSError) as error:
                refusal = error
        message = from_the_first({"refusal": refusal and str(refusal)})["refusal"]
        if refusal is not None:
            raise refusal
        if message:
            raise ValueError(message)
        yield handle
