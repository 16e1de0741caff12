"""What differs between versions of Pallas, Triton and jax-triton, and between devices.

The accelerator backends import Pallas and call Triton through here. Triton and
jax-triton are optional: nothing of them is imported before a backend that needs them is
called.

A kernel normally runs on JAX's default device. Away from it there is
    Triton       TRITON_INTERPRET=1 in the environment before its first use: the
                 kernels run in Triton's interpreter on the CPU;
                 `recorded` and `compiled`: they are compiled to machine code for a GPU
                 that need not be there;
    Pallas       on a CPU the kernels run in interpret mode;
    both         `lowering_for(platform)`: what is traced inside is for that platform.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_target: ContextVar[str | None] = ContextVar("target", default=None)
_record: ContextVar[list | None] = ContextVar("record", default=None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what a kernel traced now will run on."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def lowering_for(name: str) -> Iterator[None]:
    """Kernels traced inside are for the platform `name`, whatever machine this is.

    Lower what was traced with `.lower(lowering_platforms=(...))`; it cannot run here.
    """
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def partitioned_by_xla() -> bool:
    """Whether XLA may have to split what is traced now over several devices.

    It cannot split a kernel; inside `jax.shard_map` every device has its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.axis_names and mesh.are_all_axes_manual)


# Triton


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why a Triton kernel cannot be called here; None if it can."""
    if not _installed("triton"):
        return "triton is not installed: pip install -e '.[gpu]'"
    if interpreted() or _record.get() is not None:
        return None
    if platform() != "gpu":
        return "needs an NVIDIA GPU, or TRITON_INTERPRET=1 for Triton's interpreter"
    try:
        jax_triton()
    except ImportError as error:
        return f"jax_triton: {error}"
    return None


@functools.cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@functools.cache
def jax_triton():
    """The module jax_triton.

    Its version 0.4.1 registers a rule for dead code with two arguments, which JAX 0.12
    calls with three; without it JAX's own rule is used, which suits a pure kernel.
    """
    if not _installed("jax_triton"):
        raise ImportError("not installed: pip install -e '.[gpu]'")
    _set_fusion()
    module = importlib.import_module("jax_triton")
    if jax.__version_info__ >= (0, 12):
        primitive = module.triton_lib.triton_kernel_call_p
        rules = module.triton_lib.pe.dce_rules
        if len(inspect.signature(rules[primitive]).parameters) == 2:
            del rules[primitive]
    return module


def _set_fusion() -> None:
    """Says what Triton 3.9 warns that it may one day no longer assume."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class TritonCall:
    """One call of a Triton kernel, enough to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple  # ShapeDtypeStruct, or a Python int
    outputs: tuple
    num_warps: int
    constants: dict = field(hash=False)


def triton_call(kernel, grid, arguments, outputs, *, num_warps=4, **constants):
    """Runs a kernel whose parameters are `arguments`, `outputs`, then `constants`.

    Args:
        kernel: a function under `triton.jit`.
        grid: one to three sizes.
        arguments: arrays, contiguous, and Python ints, which are not compiled in.
        outputs: ShapeDtypeStructs; their memory is not initialised.
        num_warps: of each program.
        **constants: the `tl.constexpr` parameters.

    Returns:
        A tuple of arrays like `outputs`.
    """
    grid, outputs = tuple(grid), tuple(outputs)
    if math.prod(grid) == 0:
        raise ValueError(f"grid must be positive, got {grid}")
    record = _record.get()
    if record is not None:
        shapes = tuple(
            x if isinstance(x, int) else jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in arguments
        )
        record.append(TritonCall(kernel, grid, shapes, outputs, num_warps, constants))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outputs)
    if interpreted():
        return _interpret(kernel, grid, arguments, outputs, constants)
    module = jax_triton()
    new = module.__version_info__ >= (0, 4)
    options: dict[str, Any] = {"out_type" if new else "out_shape": outputs}
    if jax.default_backend() != "gpu":
        options["compute_capability"] = 90  # there is no device to ask
    return tuple(
        module.triton_call(
            *arguments,
            kernel=kernel,
            grid=grid,
            num_warps=num_warps,
            **options,
            **constants,
        )
    )


_TYPES = {
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bfloat16": "bf16",
    "int32": "i32",
    "int8": "i8",
    "bool": "i1",
}


class _Tensor:
    """A NumPy array as Triton's interpreter wants its tensors."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.dtype = _TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(x // self.array.itemsize for x in self.array.strides)

    def copy_(self, other):
        pass


@functools.cache
def _mend_interpreter() -> None:
    """Makes the interpreter right for bfloat16, which it keeps as uint16: `tl.dot`
    would multiply it as such, and casts to it would cut off where a GPU rounds."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        words = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(words.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, x, target):
        if target.scalar != tl.bfloat16 or not x.dtype.scalar.is_floating():
            return cast(self, x, target)
        rounded = widened(x).data.astype(jnp.bfloat16)
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _interpret(kernel, grid, arguments, outputs, constants):
    _mend_interpreter()
    arrays = [x for x in arguments if not isinstance(x, int)]

    def run(*words):
        arrays_here = map(_from_words, words, arrays)
        given = [
            x if isinstance(x, int) else _Tensor(next(arrays_here)) for x in arguments
        ]
        # what a kernel fails to write must not look right
        made = [_unwritten(out) for out in outputs]
        with np.errstate(all="ignore"):
            kernel[grid](*given, *map(_Tensor, made), **constants)
        return tuple(map(_to_words, made))

    shapes = tuple(
        jax.ShapeDtypeStruct(words.shape, words.dtype)
        for words in (jax.eval_shape(_to_words_here, out) for out in outputs)
    )
    made = jax.pure_callback(
        run, shapes, *map(_to_words_here, arrays), vmap_method="sequential"
    )
    return tuple(map(_from_words_here, made, outputs))


# A callback may run in a thread that does not know of `jax.enable_x64`, where JAX would
# round its arrays to float32: 64 bits travel as two words.


def _to_words_here(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32) if _is_long(x) else x


def _from_words_here(x, like):
    return jax.lax.bitcast_convert_type(x, like.dtype) if _is_long(like) else x


def _to_words(x):
    return x.view(np.uint32).reshape(*x.shape, 2) if _is_long(x) else x


def _from_words(x, like):
    x = np.array(x, order="C")
    return x.view(like.dtype).reshape(like.shape) if _is_long(like) else x


def _is_long(x):
    return jnp.dtype(x.dtype).itemsize == 8


def _unwritten(out):
    floating = jnp.issubdtype(out.dtype, jnp.floating)
    return np.full(out.shape, np.nan if floating else 0, out.dtype)


@contextlib.contextmanager
def recorded() -> Iterator[list[TritonCall]]:
    """Triton kernels traced inside are not run: the list gets their calls."""
    calls: list[TritonCall] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def compiled(call: TritonCall, capability: int = 90) -> dict[str, int]:
    """Compiles the kernel of a call for an NVIDIA GPU of the compute capability.

    Returns:
        registers per thread, spilled bytes, shared memory in bytes.

    Raises:
        RuntimeError, triton.CompilationError: it does not compile.
    """
    _set_fusion()
    import triton
    from triton.backends.compiler import GPUTarget

    names = call.kernel.arg_names
    given = [*call.arguments, *call.outputs]
    signature = {
        name: "i32" if isinstance(x, int) else "*" + _TYPES[x.dtype.name]
        for name, x in zip(names, given, strict=False)
    }
    signature |= {name: "constexpr" for name in names[len(given) :]}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(given)
        if not isinstance(x, int) or x % 16 == 0
    }
    source = triton.compiler.ASTSource(
        call.kernel, signature, constexprs=dict(call.constants), attrs=aligned
    )
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        made = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": call.num_warps},
        )
    registers, spilled = _registers(made.asm["ptx"])
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": made.metadata.shared,
    }


def _registers(ptx: str) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as the assembler reports them."""
    import triton

    folder = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = next(
        path for path in (folder / "ptxas-blackwell", folder / "ptxas") if path.exists()
    )
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as place:
        source = pathlib.Path(place, "kernel.ptx")
        source.write_text(ptx)
        said = subprocess.run(
            [assembler, "-v", f"-arch={architecture}", source, "-o", "/dev/null"],
            capture_output=True,
            text=True,
        )
    if said.returncode:
        raise RuntimeError(f"ptxas: {said.stderr.strip()}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.stderr)
    return int(re.search(r"Used (\d+) registers", said.stderr)[1]), sum(
        map(int, spills)
    )


# Pallas on TPU


def pallas_tpu_missing() -> str | None:
    """Why a Pallas TPU kernel cannot be called here; None if it can."""
    if platform() == "gpu":
        return "needs a TPU, or a CPU for interpret mode"
    return None


def pallas_tpu_call(kernel, *, grid, semantics, **options):
    """`pl.pallas_call` for TPU; on a CPU in interpret mode.

    Args:
        kernel: the body.
        grid: its sizes.
        semantics: "parallel" or "arbitrary" (in order) for each axis of the grid.
        **options: in_specs, out_specs, out_shape, scratch_shapes of `pl.pallas_call`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    if platform() == "tpu":
        options["compiler_params"] = pltpu.CompilerParams(dimension_semantics=semantics)
    else:
        options["interpret"] = True
    return pl.pallas_call(kernel, grid=grid, **options)
