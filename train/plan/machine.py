"""What a step is planned for: a machine whose compiler is here, this machine, or CPU
devices that stand for one."""

import contextlib
import dataclasses
import os

import jax

from kernels import compat
from kernels.check import targets
from kernels.check.targets import Target

HERE = "here"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that a step is compiled for.

    Attributes:
        name: on the command line.
        devices: all of them, in the order that a mesh takes them.
        memory: of each, in bytes; None where that is not known.
        target: what its compiler, ahead of time, compiles for; None: JAX compiles for
            devices that it has.
        note: what a reader must know of all figures; "" for nothing.
    """

    name: str
    devices: tuple[jax.Device, ...]
    memory: int | None
    target: Target | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """What the devices call themselves."""
        return self.devices[0].device_kind

    @property
    def lowering(self) -> tuple[str, ...]:
        """The platforms that a step is lowered for; () is JAX's own."""
        return () if self.target is None else (self.target.lowering,)

    def tracing(self) -> contextlib.AbstractContextManager:
        """What is traced inside is for this machine."""
        if self.target is None:
            return contextlib.nullcontext()
        return compat.lowering_for(self.target.platform)


def prepare(name: str, emulate: bool = False) -> Target | None:
    """Makes this process one that can compile for the machine `name`; to be called
    before JAX has started. Where the compiler of a target is missing, or with
    `emulate`, JAX gets as many CPU devices as it has.

    Returns:
        The target; None for this machine.

    Raises:
        ValueError: there is no such target.
    """
    if name == HERE:
        return None
    target = targets.find(name)
    targets.prepare()
    if emulate or target.missing():
        flag = f"--xla_force_host_platform_device_count={target.count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    return target


def find(name: str, emulate: bool = False) -> Machine:
    """The machine `name`: "here", or a target as `kernels.check.targets.find` has it,
    for which `prepare` was called.

    Raises:
        ValueError: there is no such target, or JAX has other devices than were asked
            for.
    """
    if name == HERE:
        devices = tuple(jax.devices())
        return Machine(name, devices, memory(devices[0]))
    target = targets.find(name)
    reason = "it was asked for" if emulate else target.missing()
    if reason is None:
        return Machine(name, tuple(target.devices()), target.memory, target)
    devices = tuple(jax.devices("cpu"))
    if len(devices) != target.count:
        raise ValueError(
            f"--target {name} stands for {target.count} devices, and JAX has started "
            f"with {len(devices)}"
        )
    note = (
        f"emulated: {target.count} CPU devices stand for {name} ({reason}); "
        "kernels are not in it, and temporaries are those of XLA for CPUs"
    )
    return Machine(name, devices, target.memory, note=note)


def memory(device: jax.Device) -> int | None:
    """Bytes that a device of this machine has; of CPU devices each its share."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return pages // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")
