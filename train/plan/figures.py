"""The plan of a step: what one device holds, computes and exchanges."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from train.plan.program import Collective, Runs
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """What compiling one step has shown. Bytes are those of one device.

    Attributes:
        machine, kind, devices: whose, what and how many.
        note: what a reader must know of all figures.
        mesh: axis -> size.
        model: layer, depth and features, in words.
        batch: rows of the global batch.
        parameters: how many numbers the model trains.
        changes: key of the config -> value, which this plan has otherwise than the
            config.
        held: what -> bytes, of state and batch, as their shardings say.
        memory: of a device; None where it is not known.
        seconds: to compile; None where nothing was compiled.
        refused: what the compiler said where it found that the step does not fit;
            "" elsewhere. Then all that follows but `needed` is empty.
        needed: bytes at the worst moment.
        arguments: bytes of state and batch as the compiler lays them out.
        temporaries: the most that is alive at once beside them.
        outputs: what comes out in no argument's place.
        program: its code.
        activations: what JAX keeps for the backward pass of one micro-batch, before the
            compiler has looked at it: an upper bound of their part of the temporaries.
        flops, moved: of a step, by a cost analysis; None where there is none.
        costs_from: whose analysis that is.
        loops: whether the program has loops, of which such an analysis counts one run.
        products: floating-point operations of matrix products, convolutions and
            transforms on all devices together, loops as often as they run.
        kernels: operation -> (backend, why), as `kernels.dispatch` chose.
        calls: of our kernels in the program.
        collectives: all of them.
    """

    machine: str
    kind: str
    devices: int
    note: str
    mesh: dict[str, int]
    model: str
    batch: int
    parameters: int
    changes: dict
    held: dict[str, int]
    memory: int | None
    seconds: float | None = None
    refused: str = ""
    needed: int | None = None
    arguments: int | None = None
    temporaries: int | None = None
    outputs: int | None = None
    program: int | None = None
    activations: int | None = None
    flops: float | None = None
    moved: float | None = None
    costs_from: str = ""
    loops: bool = False
    products: float | None = None
    kernels: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    calls: tuple[Runs, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device has room; True where its memory is not known."""
        if self.refused:
            return False
        return None in (self.memory, self.needed) or self.needed <= self.memory

    @property
    def free(self) -> int | None:
        """Bytes of a device that are left; None where that is not known."""
        if self.memory is None or self.needed is None:
            return None
        return self.memory - self.needed

    def exchanged(self) -> dict[str, dict]:
        """Kind of collective -> "count" of them in the program, "runs" in a step, their
        "bytes" per step, and whether these two are "exact": outside of loops whose
        length is not known."""
        kinds: dict[str, dict] = {}
        for one in self.collectives:
            kind = kinds.setdefault(
                one.kind, dict(count=0, runs=0, bytes=0, exact=True)
            )
            kind["count"] += 1
            kind["runs"] += one.runs.count
            kind["bytes"] += one.bytes_per_step
            kind["exact"] &= one.runs.exact
        return kinds

    def called(self) -> Runs:
        """How often a step runs a kernel of ours."""
        count = sum(one.count for one in self.calls)
        return Runs(count, all(one.exact for one in self.calls))

    def as_json(self) -> dict:
        """All of it, what is derived too."""
        rows = [
            dataclasses.asdict(one) | {"bytes_per_step": one.bytes_per_step}
            for one in self.collectives
        ]
        return dataclasses.asdict(self) | {
            "fits": self.fits,
            "free": self.free,
            "exchanged": self.exchanged(),
            "calls_in_program": len(self.calls),
            "calls_per_step": self.called().count,
            "collectives": rows,
        }


def held(state: TrainState, batch: Mapping) -> dict[str, int]:
    """What -> its bytes on one device, of state and batch as their shardings say."""
    parts = {
        "parameters": state.params,
        "optimiser state": state.opt_state,
        "averaged weights": state.ema,
        "other collections": (state.batch_stats, state.buffers),
        "batch": batch,
    }
    sizes = {name: sum(map(_shard, jax.tree.leaves(x))) for name, x in parts.items()}
    return {name: size for name, size in sizes.items() if size}


def _shard(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def gigabytes(count: float) -> str:
    """Bytes as a reader takes them in: "1.25 GB", "310 MB"."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if abs(count) >= 1e7 else f"{count / 1e6:.2f} MB"
