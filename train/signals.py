"""SIGTERM and SIGINT as a question that the loop asks between two steps."""

import contextlib
import signal
import threading
from types import SimpleNamespace


@contextlib.contextmanager
def stop_signals():
    """Yields an object whose `signal` names the SIGTERM or SIGINT that came, else None.

    A second SIGINT acts as if this were not there: a run that hangs can be ended.
    """
    stop = SimpleNamespace(signal=None)
    before = {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, _):
        stop.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    # Only the main thread receives signals, and only it may ask for them.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, receive)
    try:
        yield stop
    finally:
        restore()
