"""How far the loop is ahead of the device, and when several processes stop."""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.signals import Stop

SLOW = 1.0  # seconds of a step from which on the next one waits for it


class Pace:
    """The steps that are computed or wait to be: two at most.

    What is shown as done is done, and a signal waits for no more: for one step where
    steps take a second or more, which wait for one another and do not notice; else for
    two. How long they take is unknown of the first alone, so the second waits for it.

    Several processes must compute the same steps. With every step each of them tells
    the others whether it was asked to stop, and looks at the sum once that step is
    done: all see the same one before the same step. A signal that comes while one step
    is computed is told with the next but one, and two more may have begun by then.
    """

    AHEAD = 2  # steps that several processes begin after one of them has said to stop

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._several = jax.process_count() > 1
        self._steps = collections.deque()
        self._slow = True  # until a step was quick
        self._ended = time.monotonic()
        self._agreed = False

    def __len__(self) -> int:
        """How many steps were begun and are not known to be done."""
        return len(self._steps)

    def begun(self, result: jax.Array, stopping: bool) -> None:
        """Takes note of a step.

        Args:
            result: one of its results.
            stopping: whether this process is to stop.
        """
        flags = self._sum(stopping) if self._several else None
        self._steps.append((result, flags, time.monotonic()))

    def wait(self) -> None:
        """Returns when another step may be begun."""
        self._wait(0 if self._slow and not self._several else 1)

    def drain(self) -> None:
        """Returns when all steps are done."""
        self._wait(0)

    def goes_on(self, stop: Stop) -> bool:
        """Whether none of several processes was asked to stop in a step that is done;
        else this one is too."""
        if self._agreed:
            stop.join()
        else:
            stop.ends_after("step and those that all processes have begun")
        return not self._agreed

    def _wait(self, limit: int) -> None:
        while len(self._steps) > limit:
            result, stopping, begun = self._steps.popleft()
            jax.block_until_ready(result)
            now = time.monotonic()
            # Nothing was computed between the end of one and the begin of the next,
            # such as during an evaluation.
            self._slow = now - max(self._ended, begun) > SLOW
            self._ended = now
            if stopping is not None:
                self._agreed |= bool(stopping)

    def _sum(self, stopping: bool) -> jax.Array:
        """How many devices belong to a process that was asked to stop."""
        devices = self._mesh.devices.size
        every = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        local = np.full(devices, stopping, np.int32)
        flags = jax.make_array_from_callback((devices,), every, lambda at: local[at])
        return _total(flags, NamedSharding(self._mesh, PartitionSpec()))


def _total(flags: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.jit(jnp.sum, out_shardings=place)(flags)
