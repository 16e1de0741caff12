"""What to change where a step does not fit: tried by compiling it, not guessed.

In this order, so that what is found first costs least:
    1. model.remat, which computes every block once more, by a third more work, and
       changes no number;
    2. train.accumulate, the smallest that is enough: the same gradient in so many
       parts, each of fewer rows (only batch statistics and dropout see that);
    3. both;
    4. mesh.fsdp, the smallest that is enough: parameters, optimiser state and averages
       divided over so many devices, which exchange them in every step;
    5. mesh.fsdp and model.remat;
    6. mesh.fsdp, model.remat and the smallest train.accumulate that is enough.
The largest of a kind is compiled first: where it does not fit no smaller one does. What
state and batch alone rule out is not compiled.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.plan import compiling
from train.plan.compiling import Task
from train.plan.figures import Plan, gigabytes
from train.plan.machine import Machine

Changes = dict[str, Any]


def families(task: Task, machine: Machine) -> Iterator[list[Changes]]:
    """The changes there are, those of one family together, the smallest first."""
    config = task.config
    remat = [] if config.model.remat else [{"model.remat": True}]
    parts = [{"train.accumulate": n} for n in _parts(config, machine)]
    shards = [{"mesh.fsdp": n} for n in _shards(config, machine)]

    def together(first: list[Changes], second: list[Changes]) -> list[Changes]:
        return [a | b for a in first for b in second]

    yield remat
    yield parts
    yield together(remat, parts)
    yield shards
    yield together(shards, remat)
    yield together(shards[-1:], together(remat or [{}], parts))


def _parts(config, machine: Machine) -> list[int]:
    """The powers of 2 times today's number of micro-batches that divide a device's
    rows."""
    rows = config.train.batch_size // _rows_over(config, machine)
    now = config.train.accumulate
    return [now * 2**k for k in range(1, rows.bit_length()) if not rows % (now * 2**k)]


def _shards(config, machine: Machine) -> list[int]:
    """The powers of 2 that divide the devices among which rows are shared."""
    count, now = _rows_over(config, machine), config.mesh.fsdp
    if config.mesh.data != -1:  # then the config says where every device is
        return []
    return [
        2**k for k in range(1, count.bit_length()) if 2**k > now and not count % 2**k
    ]


def _rows_over(config, machine: Machine) -> int:
    """The devices among which the rows of a batch are shared."""
    kept = [config.mesh.get(axis, 1) for axis in ("tensor", "sequence")]
    return len(machine.devices) // math.prod(kept)


def find(
    task: Task,
    machine: Machine,
    tell: Callable[[str], None] = lambda line: None,
    compile_step: Callable[..., Plan] = compiling.plan,
) -> Plan | None:
    """The plan of the first change after which the step fits; None if none does.

    Args:
        task: what does not fit as it is.
        machine: where.
        tell: gets a line for every change that was tried.
        compile_step: as `compiling.plan`.
    """

    def tried(changes: Changes) -> Plan | None:
        """The plan after changes; None for those that are refused, such as a mesh along
        which nothing is split."""
        try:
            found = compile_step(task, machine, changes, trial=True)
        except ValueError as problem:
            tell(f"tried {said(changes)}: refused ({problem})")
            return None
        tell(f"tried {said(changes)}: {_verdict(found)}")
        return found

    for family in families(task, machine):
        most = tried(family[-1]) if family else None
        if most is None or not most.fits:
            continue
        for changes in family[:-1]:
            found = tried(changes)
            if found is not None and found.fits:
                return found
        return most
    return None


def said(changes: Mapping) -> str:
    """Changes as flags of the command."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _verdict(found: Plan) -> str:
    needed = "more than there is" if found.needed is None else gigabytes(found.needed)
    compiled = "not compiled" if found.seconds is None else f"{found.seconds:.0f} s"
    return f"{'fits' if found.fits else 'does not fit'}, needs {needed} ({compiled})"
