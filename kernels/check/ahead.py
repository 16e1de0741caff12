"""Every operation compiled ahead of time for an accelerator that need not be here.

`programs` says what is compiled for a target, `compile_row` compiles one. What the
compiler refuses, what does not fit into its fast memory and what spills registers
fails; what `unsupported` says beforehand is listed.
"""

import hashlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import compat
from kernels.check import certificate, conformance, machine_code, peers
from kernels.check.cases import OPERATIONS, Case, Operation
from kernels.check.targets import Target
from kernels.dispatch import OnPlatform

DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "gradient")  # the second with the first
# Which sizes a target is tried at.
SIZES = {
    "tpu:v5e": ("small", "benchmark", "large"),
    "tpu:v6e": ("benchmark",),
    "gpu:h100": ("benchmark",),
    "gpu:h200": ("small", "benchmark", "large", "peer"),
}
SHORT = 100  # tokens of a small case
LARGE = 2**31  # bytes, which one array of a large case has more than
CAPABILITY = 90  # of the GPUs among the targets

# Registers that are spilled all the same: (operation, backend, dtype, pass) -> (bytes
# at most, the reason).
SPILLS: dict[tuple[str, str, str, str], tuple[int, str]] = {}


@dataclass(frozen=True)
class Row:
    """One program: of an operation, by a backend, compiled for a target.

    Attributes:
        op, backend, dtype, size, case, part: what is compiled; part is one of PASSES.
        source: the hash of the operation's sources.
        program: the hash of what is given to the compiler; "" where nothing was.
        verdict: "compiled", "failed", "does not fit" (into the device's memory) or "not
            taken" (what `unsupported` says of it).
        reason: of a verdict that is not "compiled".
        seconds: to compile.
        arguments, outputs, temporaries: bytes.
        moved: bytes that XLA moves around the kernels, by a TPU's cost analysis.
        kernels: how many of ours the program calls.
        vmem: bytes of a TPU's fast memory, the most of all kernels.
        registers, spilled_bytes, shared_bytes: of a GPU, the most of all kernels.
    """

    op: str
    backend: str
    dtype: str
    size: str
    case: str
    part: str
    source: str
    program: str = ""
    verdict: str = ""
    reason: str = ""
    seconds: float | None = None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    moved: int | None = None
    kernels: int | None = None
    vmem: int | None = None
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What it is that was compiled, and of which sources."""
        return (*self.subject, self.source)

    @property
    def subject(self) -> tuple[str, ...]:
        """What it is that was compiled."""
        keys = ("op", "backend", "dtype", "size", "case", "part")
        return tuple(getattr(self, name) for name in keys)

    @property
    def bad(self) -> bool:
        return self.verdict == "failed"

    def as_json(self) -> dict:
        return {name: x for name, x in asdict(self).items() if x not in (None, "")}


@dataclass(frozen=True)
class Program:
    """What one row compiles."""

    operation: Operation
    case: Case
    row: Row


def programs(
    target: Target,
    operations: Sequence[Operation],
    backends: Sequence[str],
    dtypes: Sequence[str],
    quick: bool = False,
) -> Iterator[Program]:
    """All that is compiled for a target; of `quick` the kernels for it, at benchmark
    size and in float32."""
    for operation in operations:
        source = certificate.source_hash(operation.folder)
        for backend, module in operation.backends.items():
            ours = isinstance(module, OnPlatform)
            if (
                backend == "reference"
                or backend not in backends
                or (ours and module.platform != target.platform)
                or (quick and not ours)
            ):
                continue
            for size in ("benchmark",) if quick else SIZES[target.name]:
                for case, dtype in _cases(operation, size, dtypes, quick):
                    for part in PASSES:
                        what = operation.name, backend, dtype, size, str(case), part
                        row = Row(*what, source)
                        yield Program(operation, case, row)


def _cases(operation, size, dtypes, quick):
    """Of small ones every variant with every option; at benchmark size every variant
    without, and one with; of large ones one without; a peer's work in its dtype."""
    if size == "peer":
        for work in peers.WORK:
            if work.op == operation.name and peers.DTYPE in dtypes:
                yield Case(work.variant, peers.LENGTH), peers.DTYPE
        return
    for dtype in dtypes[:1] if quick else dtypes:
        length = SHORT if size == "small" else operation.length
        optioned = {}
        for variant, *options, _ in operation.product((length,), [dtype], wide=True):
            optioned.setdefault(variant, Case(variant, *options))
        if not optioned:  # what is complex alone has no bfloat16
            continue
        if size == "large":
            first = Case(next(iter(optioned)), length)
            yield first._replace(length=_beyond(operation, first, dtype)), dtype
        elif size == "small":
            yield from ((case, dtype) for case in optioned.values())
        else:
            plain = [Case(variant, length) for variant in optioned]
            yield next(iter(optioned.values())), dtype
            yield from ((case, dtype) for case in (plain[:1] if quick else plain))


def _beyond(operation, case, dtype) -> int:
    """The least length, of whole tiles, at which an array has more than LARGE bytes."""
    forward, _, arrays = conformance.passes(operation, case, dtype, "reference")
    long = [x for x in jax.tree.leaves(arrays) if case.length in x.shape]
    if not long:  # what is made of a few numbers
        long = jax.tree.leaves(jax.eval_shape(forward, *arrays))
    most = max(math.prod(x.shape) * x.dtype.itemsize for x in long)
    return 128 * (LARGE * case.length // most // 128 + 1)


def compile_row(target: Target, program: Program, before: Row | None = None) -> Row:
    """The row of a program, with a verdict.

    Args:
        target: of the compiler.
        program: what it compiles.
        before: the row of the same made of other sources. Where these give the compiler
            what the sources of today give it, what that said still holds.
    """
    operation, case, row = program.operation, program.case, program.row
    wide = row.size != "small"
    sizes = peers.sizes(row.op, case.variant) if row.size == "peer" else {}
    try:
        forward, both, arrays = conformance.passes(
            operation, case, row.dtype, row.backend, wide, **sizes
        )
        function = forward
        if row.part == "gradient":
            function = both
            with compat.lowering_for(target.platform):
                # what a model's next layer gives
                arrays = *arrays, jax.eval_shape(forward, *arrays)
        lowered = _lowered(target, function, arrays)
        text = lowered.as_text().encode()
        row = replace(row, program=hashlib.sha256(text).hexdigest())
        if before is not None and before.program == row.program:
            return replace(before, source=row.source)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    except Exception as problem:
        return _refused(row, problem)
    memory = compiled.memory_analysis()
    row = replace(
        row,
        verdict="compiled",
        seconds=round(seconds, 2),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )
    if target.platform == "tpu":
        return replace(row, **_tpu_figures(compiled))
    return _judged(replace(row, **_gpu_figures(function, arrays)))


def _lowered(target, function, arrays):
    """What the compiler of the target is given, for one device."""
    mesh = Mesh([target.device()], ("only",))
    place = NamedSharding(mesh, PartitionSpec())
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
    )
    with compat.lowering_for(target.platform):
        traced = jax.jit(function, out_shardings=place).trace(*arrays)
        return traced.lower(lowering_platforms=(target.lowering,))


def _refused(row, problem):
    predicted = conformance.refusal(problem, row.op, row.backend)
    if predicted is not None:
        return replace(row, verdict="not taken", reason=predicted)
    reason = conformance.one_line(problem)
    full = re.search(r"memory (space|on) hbm", str(problem), re.I)
    return replace(row, verdict="does not fit" if full else "failed", reason=reason)


def _tpu_figures(compiled) -> dict:
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^]]*?"size":"(\d+)"'
    sizes = [int(size) for line in calls for size in re.findall(used, line)]
    moved = compiled.cost_analysis().get("bytes accessed")
    return {
        "moved": None if moved is None else int(moved),
        "kernels": len(calls),
        "vmem": max(sizes, default=None),
    }


def _gpu_figures(function, arrays) -> dict:
    """Of the Triton kernels that the function calls, each compiled alone."""
    calls = machine_code.calls(function, arrays)
    made = [machine_code.compiled(call, CAPABILITY) for call in calls]
    names = ("registers", "spilled_bytes", "shared_bytes")
    most = {name: max((m[name] for m in made), default=None) for name in names}
    return {"kernels": len(calls)} | most


def _judged(row: Row) -> Row:
    """A row of a GPU, failed where it spills more than SPILLS allows or needs more
    shared memory than there is."""
    allowed, _ = SPILLS.get((row.op, row.backend, row.dtype, row.part), (0, ""))
    if (row.spilled_bytes or 0) > allowed:
        return failed(row, f"{row.spilled_bytes} bytes are spilled")
    available = conformance.CAPABILITIES[CAPABILITY]
    if (row.shared_bytes or 0) > available:
        return failed(
            row, f"{row.shared_bytes} bytes of shared memory, there are {available}"
        )
    return row


def order(row: Row) -> tuple:
    """Of the rows in a file."""
    return (
        list(OPERATIONS).index(row.op),
        list(OPERATIONS[row.op].backends).index(row.backend),
        SIZES["gpu:h200"].index(row.size),  # which has them all
        DTYPES.index(row.dtype),
        row.case,
        PASSES.index(row.part),
    )


def failed(row: Row, reason: str) -> Row:
    """A row whose program could not be made."""
    return replace(row, verdict="failed", reason=reason)
