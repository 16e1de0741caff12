"""Processes that prepare the batches of a stream, in its order.

Process k of n prepares batches k, k + n, k + 2 n, ... and is asked for them in turn.
Signals that reach the whole group are none of its business: whoever asks for batches
decides when they are no longer needed, and ends the processes.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker, util

import cloudpickle
import numpy as np

from train import signals

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerError(RuntimeError):
    """A process that prepares batches has died."""


class Workers(Iterator):
    """The elements of `stream` from number `first` on, prepared by `count` processes.

    Args:
        stream: random access without end; it and its elements are sent between
            processes.
        first: number of the element that comes first.
        count: of the processes.
    """

    def __init__(self, stream: Sequence, first: int, count: int):
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # which would unblock signals again below
        self._workers = []
        self._taken = 0
        # multiprocessing would end them by a signal that they ignore.
        self.close = util.Finalize(self, _end, (self._workers,), exitpriority=1)
        pickled = cloudpickle.dumps(stream)
        for number in range(count):
            ours, theirs = context.Pipe()
            # All that a process is given at its start fits into a pipe: starting one
            # that dies at once would wait for ever for the rest to be read.
            process = context.Process(
                target=_work, args=(theirs,), daemon=True, name=f"data-{number}"
            )
            # blocked signals are inherited, until it ignores them
            with signals.STARTS, _blocked(SIGNALS):
                process.start()
            theirs.close()  # so that reading from a dead one ends
            job = pickled, first + number, count
            giver = threading.Thread(target=_give, args=(ours, job), daemon=True)
            giver.start()
            self._workers.append((process, ours, giver))

    def ready(self, stopped: Callable[[], object]) -> bool:
        """Waits for the next element, but no longer once `stopped()`."""
        _, connection, _ = self._next()
        while not connection.poll(POLL_SECONDS):
            if stopped():
                return False
        return True

    def __next__(self):
        process, connection, _ = self._next()
        try:
            element, error = _received(connection)
        except (EOFError, OSError):
            process.join(1)
            raise WorkerError(
                f"data worker {self._taken % len(self._workers) + 1} of "
                f"{len(self._workers)} (process {process.pid}) has died, "
                f"{_reason(process.exitcode)}; the run can be started again, with "
                "fewer data.workers if memory was short"
            ) from None
        if error is not None:
            raise error
        self._taken += 1
        return element

    def _next(self):
        return self._workers[self._taken % len(self._workers)]


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"by {signal.Signals(-code).name}"


def _end(workers: list) -> None:
    """Nothing is lost: they hold no more than what they have prepared."""
    for process, *_ in workers:
        process.kill()
    for process, connection, giver in workers:
        process.join()
        giver.join()  # or it would go on writing to whatever has this handle next
        connection.close()


@contextlib.contextmanager
def _blocked(numbers):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(connection, job) -> None:
    """Sends what a worker is to do. One that has died is noticed by who asks it."""
    with contextlib.suppress(OSError):
        connection.send(job)


def _work(connection) -> None:
    """The life of a worker: it ends when it is killed or nobody listens any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        pickled, number, stride = connection.recv()
    except (EOFError, OSError):
        return
    # One is on its way and one waits while the next is prepared.
    prepared = queue.Queue(1)
    threading.Thread(target=_send, args=(connection, prepared), daemon=True).start()
    try:
        stream = cloudpickle.loads(pickled)
        while True:
            prepared.put((stream[number], None))
            number += stride
    except Exception as error:
        error.add_note(f"in a data worker:\n{traceback.format_exc()}")
        prepared.put((None, error))
        signal.pause()


def _send(connection, prepared) -> None:
    while True:
        element = prepared.get()
        try:
            _sent(connection, element)
        except OSError:  # the parent has ended
            os._exit(1)
        except Exception as error:  # what cannot be pickled
            _sent(connection, (None, TypeError(f"{type(error).__name__}: {error}")))


def _sent(connection, value) -> None:
    """Sends what can be pickled, the memory of arrays as it lies there."""
    arrays = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [array.raw() for array in arrays]
    connection.send((head, [part.nbytes for part in parts]))
    for part in parts:
        while part.nbytes:
            part = part[os.write(connection.fileno(), part) :]


def _received(connection):
    """What `_sent` sends; its arrays own their memory and can be written to."""
    head, sizes = connection.recv()
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        remainder = memoryview(array)
        while remainder.nbytes:
            count = os.readv(connection.fileno(), [remainder])
            if not count:
                raise EOFError
            remainder = remainder[count:]
    return pickle.loads(head, buffers=arrays)
