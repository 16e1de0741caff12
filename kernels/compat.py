"""What differs between versions of Pallas, Triton and jax-triton, and between devices.

The accelerator backends import Pallas and call Triton through here. Triton and
jax-triton are optional: nothing of them is imported before a backend that needs them is
called.

A kernel normally runs on JAX's default device. Away from it there is
    Triton       TRITON_INTERPRET=1 in the environment before its first use: the
                 kernels run in Triton's interpreter on the CPU;
                 `recorded()`: what is traced inside is only noted, for
                 `kernels.check.machine_code` to compile it;
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
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from kernels import interpreter

_target: ContextVar[str | None] = ContextVar("target", default=None)
_record: ContextVar[list | None] = ContextVar("record", default=None)
_count: ContextVar[int] = ContextVar("count", default=0)


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


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
    """What is traced inside is for `count` devices, however many this machine has."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def partitioned_by_xla() -> bool:
    """Whether XLA may have to split what is traced now over several devices.

    It cannot split a kernel; inside `jax.shard_map` every device has its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = _count.get() or jax.device_count()
    return count > 1 and not (mesh.axis_names and mesh.are_all_axes_manual)


# Triton


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why a Triton kernel cannot be called here; None if it can."""
    if not _installed("triton"):
        return "triton is not installed: the extra [gpu] brings it"
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
        raise ImportError("not installed: the extra [gpu] brings it")
    set_fusion()
    module = importlib.import_module("jax_triton")
    if jax.__version_info__ >= (0, 12):
        primitive = module.triton_lib.triton_kernel_call_p
        rules = module.triton_lib.pe.dce_rules
        if len(inspect.signature(rules[primitive]).parameters) == 2:
            del rules[primitive]
    return module


def set_fusion() -> None:
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


@contextlib.contextmanager
def recorded() -> Iterator[list[TritonCall]]:
    """Triton kernels traced inside are not run: the list gets their calls."""
    calls: list[TritonCall] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def triton_call(
    kernel, grid, arguments, outputs, *, num_warps=4, in_place=0, **constants
):
    """Runs a kernel whose parameters are `arguments`, `outputs`, then `constants`.

    Args:
        kernel: a function under `triton.jit`.
        grid: one to three sizes.
        arguments: arrays, contiguous, and Python ints, which are not compiled in.
        outputs: ShapeDtypeStructs; their memory is not initialised.
        num_warps: warps that each program of the grid has.
        in_place: so many of the first arguments, arrays like the first outputs, are
            where these go, if nothing else needs them. A program may read of them what
            no other one writes.
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
        return interpreter.call(kernel, grid, arguments, outputs, constants)
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
            input_output_aliases={i: i for i in range(in_place)},
            **options,
            **constants,
        )
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
