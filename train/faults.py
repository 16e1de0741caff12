"""What may fail while a run goes on, and what it leaves behind then."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from train import checkpoint, files
from train.checkpoint import CheckpointError
from train.data.workers import WorkerError
from train.lock import Lock
from train.pace import Pace
from train.signals import Stopped


class BatchError(RuntimeError):
    """Examples could not be had while a run went on. Its cause says why; the message
    also says what is saved."""

    def saved(self, step: int, workdir: Path) -> "BatchError":
        """The same, said what of the run in `workdir` is on disk: `step`, if any."""
        done = f"step {step} is saved" if step else "no step done"
        return BatchError(
            f"{self}; {done}, from where the same command goes on (workdir {workdir})"
        )


class LostError(RuntimeError):
    """Another process of the run cannot be reached any more. The message says where to
    go on from."""


# Of what connects devices of several processes: Gloo, NCCL, JAX's own server.
CONNECTION = re.compile("gloo|nccl|connection|heartbeat|coordination", re.IGNORECASE)


@contextlib.contextmanager
def of_others(workdir: Path) -> Iterator[None]:
    """Turns what is raised where another process is lost into a `LostError`. That is
    noticed here where a connection breaks; where it falls silent, JAX's runtime ends
    the process."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not CONNECTION.search(str(error)):
            raise
        first, *_ = str(error).strip().splitlines()
        raise LostError(
            f"another process of the run is lost ({first[:200]}); last good "
            f"checkpoint: {checkpoint.last_good(workdir)} in {workdir}, from where the "
            "same command on all hosts goes on"
        ) from error


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turns any error of what makes examples, a user's own code as well, into a
    `BatchError`."""
    try:
        yield
    except (Stopped, jax.errors.JaxRuntimeError):  # that is the device's
        raise
    except Exception as error:
        plain = isinstance(error, (OSError, ValueError, WorkerError))
        kind = "" if plain else f"{type(error).__name__}: "
        raise BatchError(f"{kind}{error}") from error


@contextlib.contextmanager
def until_stopped(missed: list[BatchError]) -> Iterator[None]:
    """Ends the block at a signal, and at a `BatchError`, which is added to `missed`.

    Several processes save together: what one of them alone meets here, such as in a
    validation, is raised at once.
    """
    try:
        with noted(missed if jax.process_count() == 1 else None):
            yield
    except Stopped:
        pass


@contextlib.contextmanager
def noted(missed: list[BatchError] | None) -> Iterator[None]:
    """Ends the block at a `BatchError`, which is added to `missed`; None raises it."""
    try:
        yield
    except BatchError as error:
        if missed is None:
            raise
        missed.append(error)


def look_ahead(batches, left: int) -> None:
    """Where there are several processes, prepares what this one needs for the steps
    that all may have begun before it can tell the others of a `BatchError`.

    Args:
        batches: of this process.
        left: steps that are still to be made.
    """
    if jax.process_count() > 1:
        with asking():
            batches.look_ahead(min(left, Pace.AHEAD))


@contextlib.contextmanager
def of_files(workdir: Path) -> Iterator[None]:
    """Turns what keeps a file of the run from being written into a `CheckpointError`,
    which names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        full, place = files.disk_full(error), error.filename or "a file"
        if not full and not str(place).startswith(str(workdir)):
            raise
        raise CheckpointError(
            f"{'the disk is full' if full else error.strerror}: {place} cannot be "
            f"written; last good checkpoint: {checkpoint.last_good(workdir)} in "
            f"{workdir}; make {'room' if full else 'that possible'} and start the same "
            "command again"
        ) from error


@contextlib.contextmanager
def leaving(lock: Lock) -> Iterator[None]:
    """Leaves the lock behind at an error after which something may still be written, by
    other processes or a save that hangs: it is then taken over as that of a dead
    process is."""
    try:
        yield
    except BaseException:
        lock.left = jax.process_count() > 1 or checkpoint.hanging()
        raise
