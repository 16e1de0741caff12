"""Timing of compiled functions in turn, and the floors of this device."""

import math
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels import allocator

LEAST = 2e-3  # seconds of a sample: shorter functions are called several times
MEMORY = Path("/proc/meminfo")
RESIDENT = Path("/proc/self/statm")  # in pages, the second number


def with_gradients(function):
    """The result and the gradient by every argument, for a cotangent given as input."""

    def run(cotangent, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(cotangent)

    return run


def compile_function(function, arguments):
    """The compiled function, the seconds that took, its temporary bytes."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return compiled, seconds, compiled.memory_analysis().temp_size_in_bytes


def measure(
    functions: dict, repeats: int, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every function, called in turn `repeats` times after two warm-ups.

    functions: name -> (function, arguments). A function so short that calling it is
    what would be timed is called several times in a row; one whose first call takes
    more than `limit` seconds is called once more and that is all.
    """
    times = {name: [] for name in functions}
    counts = {}
    for name, (function, arguments) in functions.items():
        slow = _seconds(function, arguments, 1) > limit
        seconds = _seconds(function, arguments, 1)
        if slow:
            times[name].append(seconds)
        else:
            counts[name] = max(1, math.ceil(LEAST / seconds))
    for _ in range(repeats):
        for name, count in counts.items():
            times[name].append(_seconds(*functions[name], count))
    return times


def _seconds(function, arguments, count) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def summary(times) -> dict:
    """Median and quartiles in seconds."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"median_s": float(middle), "quartiles_s": [float(low), float(high)]}


def floors(small: bool = False, dtype="float32") -> dict[str, float]:
    """Copy bandwidth in B/s and matmul rate in FLOP/s of this device, for `dtype`."""
    accelerator = jax.default_backend() != "cpu"
    size = 2**24 if small else 2**30 if accelerator else 2**26
    side = 1024 if small else 8192 if accelerator else 2048
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    square = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    copies, products = [], []
    x = copy(x)
    jax.block_until_ready(product(square, square))
    for _ in range(7):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(product(square, square))
        products.append(time.perf_counter() - start)
    return {
        "copy_bytes_per_s": 2 * size / float(np.median(copies)),
        "matmul_flop_per_s": 2 * side**3 / float(np.median(products)),
    }


def memory() -> int:
    """Bytes of memory that this process may have: all of a device; on a CPU what the
    machine has left, which on Linux leaves out what other processes have."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    page = os.sysconf("SC_PAGE_SIZE")
    if MEMORY.exists():
        lines = MEMORY.read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
        return 1024 * int(kilobytes) + resident()
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return page * os.sysconf("SC_PHYS_PAGES")
    return 8 * 2**30


def resident() -> int:
    """Bytes of memory that this process has, on Linux."""
    return os.sysconf("SC_PAGE_SIZE") * int(RESIDENT.read_text().split()[1])


def environment() -> dict:
    """What figures depend on: the device, versions and the allocator setting."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "allocator": allocator.setting(),
    }
