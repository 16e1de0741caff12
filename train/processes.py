"""What the processes of one run tell one another."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train import lock

VISIBLE = 30.0  # seconds in which a file of process 0 must be seen by the others


def from_the_first(decision: Any) -> Any:
    """The decision of process 0, which JSON can hold, in all processes."""
    return decision if jax.process_count() == 1 else of_all(decision)[0]


def of_all(value: Any) -> list:
    """The values of all processes, which JSON can hold, by their numbers; in all."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)
    ]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What all processes do alike and each may fail in: if one does, all fail, and say
    which. Nothing inside may wait for another process.

    Raises:
        ValueError: another process failed; one's own error comes as it is.
    """
    problem = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        problem = error
    first, *_ = str(problem).strip().splitlines() or [""]
    answer = {"problem": None if problem is None else first or repr(problem)}
    told = of_all(answer | {"host": socket.gethostname()})
    if problem is not None:
        raise problem
    for number, other in enumerate(told):
        if other["problem"] is not None:
            raise ValueError(f"{_named(number, other['host'])}: {other['problem']}")


def check_same(what: str, values: dict[str, Any]) -> None:
    """Raises a `ValueError` in all processes unless `values`, which JSON can hold, are
    the same in all: it names the first process whose values are not those of process 0,
    and where they differ."""
    told = of_all({"host": socket.gethostname(), "values": values})
    first = told[0]["values"]
    for number, other in enumerate(told):
        theirs = other["values"]
        differing = [
            f"{key} is {theirs.get(key)!r:.80}, in process 0 {first.get(key)!r:.80}"
            for key in sorted({*first, *theirs})
            if first.get(key) != theirs.get(key)
        ]
        if differing:
            raise ValueError(
                f"{_named(number, other['host'])} has another {what} than process 0 "
                f"({'; '.join(differing[:5])}): all must be started alike, or with "
                "--processes=1 where each is a run of its own"
            )


@contextlib.contextmanager
def held(workdir: str | Path) -> Iterator[lock.Lock]:
    """Holds `workdir` for this run: process 0 for all, who learn what came of it.

    Raises:
        ValueError: another run has it, or `workdir` cannot be written, or is another
            folder for one of the processes.
        OSError: the disk is full; in the other processes that is a `ValueError` too.
    """
    with contextlib.ExitStack() as leaving:
        handle = lock.Lock()
        with agreed():
            if jax.process_index() == 0:
                handle = leaving.enter_context(lock.held(workdir, lock.STALE + 1))
        first = from_the_first(handle.id)
        with agreed():
            _check_shared(Path(workdir), first)
        yield handle


def _check_shared(workdir: Path, id: str) -> None:
    """Raises a `ValueError` where the lock of process 0 is not seen from here."""
    deadline = time.monotonic() + VISIBLE
    while lock.holder_id(workdir) != id:
        if time.monotonic() > deadline:
            raise ValueError(
                f"workdir must be in a file system that all processes share, got "
                f"{workdir}, where {lock.NAME} of process 0 is not to be seen"
            )
        time.sleep(0.5)


def _named(number: int, host: str) -> str:
    return f"process {number} on {host}"
