"""SIGTERM, SIGINT and SIGHUP as a question that a run asks between two steps.

The main thread spends most of its time inside the compiler or waiting for a device,
where no Python handler runs. So the operating system's handler only writes the number
of a signal into a pipe, and a thread reads it: what is going to happen is said at once,
and what there is nothing to save of ends at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Held while a process is started, of which nobody knows yet: whoever ends this one
# meanwhile would leave it half made, reading from a pipe that has no other end.
STARTS = threading.Lock()
PATIENCE = 5  # seconds that a start may take, before the end does not wait for it

_active: "Stop | None" = None


class Stopped(Exception):
    """A signal ended what was going on, of which there is nothing to save."""


class Stop:
    """What a signal would do now, and what the first one did.

    A second signal ends a program hard, and elsewhere acts as if this were not there.

    Args:
        program: whether the process may be ended: it is a command, no notebook.

    Attributes:
        signal: name of the signal that came, else None.
        code: with which a program ends that a signal stopped.
    """

    def __init__(self, program: bool):
        self.signal: str | None = None
        self.code = 0
        self.program = program
        self._lock = threading.Lock()
        self._activity: str | None = "setting up"
        self._unit: str | None = None
        self._step: int | None = None
        self._last: int | None = None

    def nothing_to_save(self, activity: str) -> None:
        """From now on a signal ends the program at once, such as while "compiling"."""
        with self._lock:
            self._activity, self._unit, self._step = activity, None, None

    def ends_after(self, unit: str) -> None:
        """From now on a signal ends what goes on after the current `unit`, such as
        "batch", where `check` is asked."""
        with self._lock:
            self._activity, self._unit, self._step = None, unit, None

    def may_begin(self, step: int) -> bool:
        """Whether `step` may be computed. If so it is what a signal saves from now on,
        which is said as soon as the signal comes, and stays true."""
        with self._lock:
            if self.signal is not None:
                return self._last is not None and step <= self._last
            self._activity = self._unit = None
            self._step = step
            return True

    def join(self) -> None:
        """Stops as another of several processes was asked to."""
        self.signal = self.signal or "a signal to another process"

    def check(self) -> None:
        """Raises `Stopped` if a signal came.

        Several processes compute together and must go on together: they stop where
        they have agreed to, between two steps, and never here.
        """
        if self.signal is None:
            return
        import jax  # not above: signals are received before JAX has started

        if jax.process_count() == 1:
            raise Stopped(f"stopped by {self.signal}")

    def receive(self, number: int) -> None:
        """What the thread does about a signal."""
        name = signal.Signals(number).name
        with self._lock:
            repeated, self.signal = self.signal is not None, self.signal or name
            if not repeated:
                self._last = self._step
            activity, unit, step = self._activity, self._unit, self._last
        if repeated:
            if self.program:
                self._end(f"ended by a second signal, {name}", 128 + number)
        elif activity is not None and self.program:
            self._end(f"stopped by {name} while {activity}: nothing to save", self.code)
        elif activity is not None:
            self._say(f"stopping ({name}) after {activity}: nothing to save")
        elif unit is not None:
            self._say(f"stopping ({name}) after this {unit}")
        else:
            self._say(f"stopping ({name}): saving step {step}")

    def _end(self, text: str, code: int) -> None:
        self._say(text)
        STARTS.acquire(timeout=PATIENCE)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(code)

    def _say(self, text: str) -> None:
        if not self.program:
            print(text, flush=True)
            return
        # Not through sys.stdout: the main thread may be holding it. A progress bar
        # may stand in the line.
        clear = "\r\x1b[K" if os.isatty(1) else ""
        with contextlib.suppress(OSError):
            os.write(1, f"{clear}{text}\n".encode())


@contextlib.contextmanager
def stop_signals(program: bool = False) -> Iterator[Stop]:
    """Yields the `Stop` of this process: that of the `with` around this one, else a new
    one that receives SIGTERM, SIGINT and, unless it is ignored (nohup), SIGHUP.

    Args:
        program: see `Stop`.
    """
    global _active
    if _active is not None:
        yield _active
        return
    stop = Stop(program)
    # Only the main thread receives signals, and only it may ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    if program and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # `os._exit` flushes nothing
    with _received(stop):
        _active = stop
        try:
            yield stop
        finally:
            _active = None


@contextlib.contextmanager
def _received(stop: Stop) -> Iterator[None]:
    """Lets the thread that reads the pipe tell `stop` of every signal."""
    before = {}

    def again(number, _):
        # The thread is told as well, but must not end what is no program.
        if received and not stop.program:
            for other, handler in before.items():
                signal.signal(other, handler)
            signal.raise_signal(number)
        received.append(number)

    def read():
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in before:
                    stop.receive(number)

    received = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=read, daemon=True, name="signals")
    thread.start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in NUMBERS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, again)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)


def stoppable(parts: Iterable) -> Iterator:
    """`parts`, up to a signal: then `Stopped` is raised instead of the next."""
    for part in parts:
        check()
        yield part


def check() -> None:
    """Raises `Stopped` if the stop of this process was asked for."""
    if _active is not None:
        _active.check()
