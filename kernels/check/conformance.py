"""Every backend of an operation against the definition, in every way there is here.

A backend is either computed (on this device, or interpreted on the CPU) and compared
with the definition in float64, values and gradients, or only lowered or compiled for
the accelerator that is not here. `run` gives one `Row` per operation, backend, way and
dtype.
"""

import concurrent.futures
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.check import cases, comparison, machine_code
from kernels.check.cases import DTYPES, OPERATIONS, Case, Operation
from kernels.tolerance import error, limit

# The first is what "quick" tries.
LENGTHS = (1000, 1, 7, 64)
LONG = (4096, 16384)  # only in "full"
INTERPRETED = {"triton": (100, 1, 7), "pallas_tpu": (1000, 1, 7)}  # seconds per case
# Of GPUs, and how many bytes of shared memory a program may have there.
CAPABILITIES = {80: 163 * 1024, 90: 227 * 1024}
HOWS = ("run", "interpreted", "lowered", *(f"compiled sm_{c}" for c in CAPABILITIES))


@dataclass
class Worst:
    """The largest error of a row: in which output, or by which argument."""

    error: float
    limit: float
    name: str
    case: str


@dataclass
class Row:
    """One backend of one operation in one dtype, tried in one way."""

    op: str
    backend: str
    how: str
    dtype: str
    cases: int = 0
    value: Worst | None = None
    gradient: Worst | None = None
    failures: list[str] = field(default_factory=list)
    not_taken: list[str] = field(default_factory=list)
    kernels: list[dict] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.failures:
            return "failed"
        return "passed" if self.cases else "not run"

    def attempt(self, case: Case, function: Callable):
        """What `function()` gives; None where the backend refuses or fails."""
        try:
            result = function()
        except Exception as problem:
            reason = refusal(problem, self.op, self.backend)
            if reason is not None:
                self.not_taken.append(f"{case}: {reason}")
                return None
            self.cases += 1
            self.failures.append(f"{case}: {one_line(problem)}")
            return None
        self.cases += 1
        return result

    def compare(self, case: Case, actual: tuple, expected: tuple) -> None:
        """Both are (values, gradients by name)."""
        named = comparison.named_outputs
        values, targets = named(actual[0]), named(expected[0])
        self.value = self._worst(case, "value", values, targets, self.value)
        self.gradient = self._worst(
            case, "gradient", actual[1], expected[1], self.gradient
        )

    def _worst(self, case, kind, actual, expected, worst):
        bound = limit(self.dtype, kind)
        named = comparison.named_arrays
        actual, expected = named(actual), named(expected)
        for name, target in expected.items():
            if name not in actual:
                self.failures.append(f"{case}: {kind} {name} is missing")
                continue
            size = error(actual[name], target)
            if not size <= bound:
                subject = name if kind == "value" else f"gradient of {name}"
                self.failures.append(
                    f"{case}: {subject}: {_off(size, actual[name], target, bound)}"
                )
            if worst is None or size > worst.error:
                worst = Worst(size, bound, name, str(case))
        return worst

    def as_json(self) -> dict:
        record = asdict(self) | {"verdict": self.verdict}
        for kind in ("value", "gradient"):
            if record[kind] and not math.isfinite(record[kind]["error"]):
                record[kind]["error"] = None  # not finite, or of another shape
        return record

    @classmethod
    def from_json(cls, record: dict) -> "Row":
        record = {k: v for k, v in record.items() if k != "verdict"}
        for kind in ("value", "gradient"):
            if record[kind]:
                size = record[kind]["error"]
                record[kind]["error"] = math.inf if size is None else size
                record[kind] = Worst(**record[kind])
        return cls(**record)


def _off(size: float, actual, target, bound: float) -> str:
    if actual.shape != target.shape:
        return f"shape {actual.shape} instead of {target.shape}"
    if not math.isfinite(size):
        return "not finite"
    return f"error {size:.2g}, limit {bound:.0e}"


def refusal(problem: Exception, op: str, backend: str) -> str | None:
    """Why the backend does not take the arguments, if that is what `problem` says."""
    beginning = f"{op}: backend {backend!r} cannot run; "
    text = str(problem)
    if not isinstance(problem, ValueError) or not text.startswith(beginning):
        return None
    match = re.search(rf"{re.escape(repr(backend))}: (.*?)(?:; '|$)", text, re.S)
    return match[1]


def one_line(problem: Exception) -> str:
    """Its first line; of an error that tells of a callback's, the last one too."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [""]
    text = lines[0][:300]
    if "Traceback" in text:
        text = f"{text} ... {lines[-1][:300]}"
    return f"{type(problem).__name__}: {text}"


# The ways in which a backend is tried.


def run(
    operations: Sequence[Operation],
    backends: Sequence[str],
    dtypes: Sequence[str],
    coverage: str = "default",
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Tries the backends of these names in every way there is here.

    Args:
        operations: values of `cases.OPERATIONS`.
        backends: names; an operation that has none of them gives no rows.
        dtypes: names among `cases.DTYPES`.
        coverage: "quick" is one case, "default" covers every two values of what a case
            consists of, "full" is the product, with longer sequences too.
        progress: is told what is being tried.
    """
    rows, waiting = [], []
    separate = [o for o in operations if "triton" in {*backends} & {*o.backends}]
    if compat.platform() == "gpu" or compat.interpreted():
        separate = []
    # Triton away from a GPU works in other processes or outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        try:
            if separate:
                for method, subject in (
                    (interpreted, separate),
                    *((compiled, operation) for operation in separate),
                ):
                    waiting.append(executor.submit(method, subject, dtypes, coverage))
            for operation in operations:
                progress(operation.name)
                names = [name for name in operation.backends if name in backends]
                if operation in separate:
                    names.remove("triton")
                rows += computed(operation, names, dtypes, coverage)
                if "pallas_tpu" in names and compat.platform() != "tpu":
                    rows += lowered(operation, dtypes, coverage)
            progress("Triton")
            for job in waiting:
                rows += job.result()
        finally:
            executor.shutdown(cancel_futures=True)
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple:
    return (
        list(OPERATIONS).index(row.op),
        list(OPERATIONS[row.op].backends).index(row.backend),
        HOWS.index(row.how),
        DTYPES.index(row.dtype),
    )


def _is_interpreted(backend: str) -> bool:
    """Of a backend that is computed in this process."""
    if backend == "triton":
        return compat.interpreted()
    return backend == "pallas_tpu" and compat.platform() == "cpu"


def _compiler_options(backend: str, dtype: str) -> dict | None:
    """Those to compile quickly where nobody uses what is compiled but this check."""
    odd = backend == "reference" or dtype == "float64" or _is_interpreted(backend)
    quick = odd and compat.platform() == "cpu"
    return comparison.QUICK_TO_COMPILE if quick else None


def _selected(candidates, coverage, strength=2):
    """(case, dtype) of everything that is tried."""
    candidates = list(candidates)
    if coverage == "quick":
        candidates = candidates[:1]
    elif coverage == "default":
        candidates = cases.covering(candidates, strength)
    return [(Case(*values), dtype) for *values, dtype in candidates]


def _plan(operation, backend, dtypes, coverage):
    lengths = LENGTHS + LONG if coverage == "full" else LENGTHS
    if _is_interpreted(backend):
        lengths = INTERPRETED[backend]
    elif backend == "reference" and coverage == "default":
        # only what a lower precision does to the definition is of interest
        products = (operation.product(lengths, [dtype]) for dtype in dtypes)
        return [pair for product in products for pair in _selected(product, "quick")]
    return _selected(operation.product(lengths, dtypes), coverage)


def computed(operation, backends, dtypes, coverage) -> list[Row]:
    """Values and gradients of the backends, on this device or interpreted."""
    plans = {name: _plan(operation, name, dtypes, coverage) for name in backends}
    rows = {}
    for case, dtype in dict.fromkeys(pair for plan in plans.values() for pair in plan):
        inputs = comparison.rounded(operation.inputs(case), dtype)
        static = operation.static(case)
        definition = functools.cache(
            functools.partial(comparison.expected, operation.call, inputs, **static)
        )
        for name in (name for name, plan in plans.items() if (case, dtype) in plan):
            options = _compiler_options(name, dtype)

            def both(static=static | {"backend": name}, inputs=inputs, options=options):
                actual = comparison.compiled_results(
                    operation.call, inputs, static, options
                )
                return actual, definition()  # noqa: B023 - called in this round

            how = "interpreted" if _is_interpreted(name) else "run"
            row = rows.setdefault((name, dtype), Row(operation.name, name, how, dtype))
            with jax.enable_x64(dtype == "float64"):
                pair = row.attempt(case, both)
            if pair is not None:
                row.compare(case, *pair)
    return list(rows.values())


def lowered(operation, dtypes, coverage) -> list[Row]:
    """pallas_tpu lowered for a TPU."""
    rows = {}
    for case, dtype in _wide_cases(operation, dtypes, coverage):
        empty = Row(operation.name, "pallas_tpu", "lowered", dtype)
        row = rows.setdefault(dtype, empty)
        forward, both_passes, arrays = passes(operation, case, dtype, "pallas_tpu")

        def count(arrays=arrays, functions=(forward, both_passes)):
            return [_tpu_kernels(function, arrays) for function in functions]

        counts = row.attempt(case, count)
        if counts is not None:
            names = ("case", "forward", "both_passes")
            row.kernels.append(dict(zip(names, (str(case), *counts), strict=True)))
    for row in rows.values():
        # some cases may need none, such as convolutions of short segments
        if row.kernels and not any(kernel["forward"] for kernel in row.kernels):
            row.failures.append("there is no TPU kernel in any lowered program")
    return list(rows.values())


def _tpu_kernels(function, arrays) -> int:
    with compat.lowering_for("tpu"):
        traced = jax.jit(function).trace(*arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return text.count("@tpu_custom_call")


def compiled(operation, dtypes, coverage) -> list[Row]:
    """triton compiled for GPUs that need not be here."""
    if _not_installed():
        return []
    capabilities = [90] if coverage == "quick" else list(CAPABILITIES)
    rows, jobs = {}, []
    for case, dtype in _wide_cases(operation, dtypes, coverage):
        _, both_passes, arrays = passes(operation, case, dtype, "triton")

        record = functools.cache(
            functools.partial(machine_code.calls, both_passes, arrays)
        )
        for capability in capabilities:
            how = f"compiled sm_{capability}"
            empty = Row(operation.name, "triton", how, dtype)
            row = rows.setdefault((dtype, capability), empty)
            for call in row.attempt(case, record) or ():
                if (call, dtype, capability) not in jobs:
                    jobs.append((call, dtype, capability))
                    _compile(row, case, call, capability)
    for row in rows.values():
        if row.cases and not row.kernels and not row.failures:
            row.failures.append("no Triton kernel was called")
    return list(rows.values())


def _compile(row, case, call, capability):
    name = call.kernel.__name__
    try:
        figures = machine_code.compiled(call, capability)
    except Exception as problem:
        row.failures.append(f"{case}: {name}: {one_line(problem)}")
        return
    label = {"kernel": name, "case": str(case), "num_warps": call.num_warps}
    row.kernels.append(label | figures)
    available, needed = CAPABILITIES[capability], figures["shared_bytes"]
    if needed > available:
        row.failures.append(
            f"{case}: {name}: {needed} B of shared memory, there are {available}"
        )


def _wide_cases(operation, dtypes, coverage):
    narrow = [dtype for dtype in dtypes if dtype != "float64"]
    candidates = operation.product((operation.length,), narrow, wide=True)
    return _selected(candidates, coverage, strength=1)


def passes(operation, case, dtype, backend, wide=True, **sizes):
    """The forward pass, both passes, and the shapes of their two arguments. Both take
    the gradient by the results as a third, or have ones for it."""
    made = (operation.shapes if wide else operation.inputs)(case, **sizes)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, comparison.precision(x.dtype, dtype)),
        made,
    )
    moving, fixed = comparison.parted(inputs)
    static = operation.static(case)

    def forward(moving, fixed):
        return operation.call(**moving, **fixed, **static, backend=backend)

    def both(moving, fixed, gradients=None):
        values, pull = jax.vjp(lambda moving: forward(moving, fixed), moving)
        if gradients is None:
            gradients = jax.tree.map(jnp.ones_like, values)
        return values, pull(gradients)

    return forward, both, (moving, fixed)


def interpreted(operations, dtypes, coverage) -> list[Row]:
    """triton in Triton's interpreter, which must be asked for before anything is
    imported: `kernels.check` in another process. Where that dies, one per operation."""
    reason = _not_installed()
    if reason:
        return [
            Row(o.name, "triton", "interpreted", dtype, not_taken=[f"all: {reason}"])
            for o in operations
            for dtype in dtypes
        ]
    command = [sys.executable, "-m", __package__, "--backend", "triton"]
    command += ["--op", *(operation.name for operation in operations)]
    command += ["--dtype", *dtypes]
    if coverage != "default":
        command.append(f"--{coverage}")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "rows.json")
        process = subprocess.run(
            [*command, "--out", str(out)],
            cwd=Path(__file__).parents[len(__package__.split("."))],
            env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if out.exists():
            contents = json.loads(out.read_text())
            return [Row.from_json(row) for row in contents["results"]]
    if len(operations) > 1:
        return [
            row
            for operation in operations
            for row in interpreted([operation], dtypes, coverage)
        ]
    last = (process.stderr.strip().splitlines() or ["no message"])[-1]
    died = f"the interpreter's process ended with code {process.returncode}: {last}"
    name = operations[0].name
    return [Row(name, "triton", "interpreted", d, 1, failures=[died]) for d in dtypes]


def _not_installed() -> str | None:
    with compat.recorded():
        return compat.triton_missing()
