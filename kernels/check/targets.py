"""Accelerators that need not be here, for whose own compilers programs are compiled.

libtpu and JAX's plugin for CUDA compile for a device that is only described to them.
What they make cannot be run, but it says what it needs: seconds to compile, bytes, and
whether it compiles at all.
"""

import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace

import jax

# Of the process: without a TPU there is nothing to ask for its name, and who compiles
# only may do so beside others, whatever lock an earlier process has left. In a program
# stands what it computes, and not where in which file that is written.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TRITON_DISABLE_LINE_INFO": "1",
}


@dataclass(frozen=True)
class Target:
    """One accelerator, or several of a kind that are joined.

    Attributes:
        name: on the command line.
        platform: "tpu" or "gpu", as in `compat.platform()`.
        kind: what the compiler calls it.
        memory: of a device, in bytes.
        bandwidth: of that memory, bytes per second.
        topology: how they are joined, chips along each axis of a TPU ("16x16") or hosts
            and GPUs of each ("8", "2x8"); "" is one device.
    """

    name: str
    platform: str
    kind: str
    memory: int
    bandwidth: int
    topology: str = ""

    @property
    def lowering(self) -> str:
        """What `jax.jit(...).lower` calls the platform."""
        return {"tpu": "tpu", "gpu": "cuda"}[self.platform]

    @property
    def packages(self) -> tuple[str, ...]:
        """The modules that compile for it, the name of one of several after a |."""
        if self.platform == "tpu":
            return ("libtpu",)
        return ("jax_cuda13_plugin|jax_cuda12_plugin", "triton", "jax_triton")

    def missing(self) -> str | None:
        """Which of its packages are not installed; None if all are."""
        absent = [
            names.partition("|")[0]
            for names in self.packages
            if not any(map(importlib.util.find_spec, names.split("|")))
        ]
        if not absent:
            return None
        return f"{self.name} needs {' and '.join(absent)}, which `make compiled` gets"

    @property
    def count(self) -> int:
        """How many devices there are."""
        return math.prod(map(int, self.topology.split("x"))) if self.topology else 1

    def device(self) -> jax.Device:
        """The first of its devices."""
        return self.devices()[0]

    def devices(self) -> list[jax.Device]:
        """All of its devices.

        Raises:
            ValueError: its compiler knows no such topology.
        """
        return _devices(self)[: self.count]


# One device of each.
TARGETS = {
    target.name: target
    for target in (
        Target("tpu:v5e", "tpu", "v5e", 16 * 2**30, 819 * 10**9),
        Target("tpu:v6e", "tpu", "v6e", 32 * 2**30, 1640 * 10**9),
        Target("gpu:h100", "gpu", "NVIDIA H100", 85 * 10**9, 3350 * 10**9),
        Target("gpu:h200", "gpu", "NVIDIA H200", 150 * 10**9, 4800 * 10**9),
    )
}


MOST_CHIPS = 2**16  # more than any pod has; what is larger would only take memory
LEAST_CHIPS = "2x2"  # of a host, fewer of which libtpu knows no topology


def find(name: str) -> Target:
    """The target of this name: a key of TARGETS, or one with a topology behind it, such
    as "tpu:v5e:16x16", chips along two axes, or "gpu:h200:8", GPUs of a host ("2x8" of
    two).

    Raises:
        ValueError: there is no such target.
    """
    first, _, topology = name.rpartition(":") if name.count(":") > 1 else (name, "", "")
    known, sizes = TARGETS.get(first), re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", topology)
    if known is None or (topology and not sizes):
        raise ValueError(
            f"target must be one of {', '.join(TARGETS)}, alone or with a topology, "
            f"such as tpu:v5e:16x16 or gpu:h200:8, got {name!r}"
        )
    if topology == "" and name != first:
        raise ValueError(f"target must have a topology after its last :, got {name!r}")
    target = replace(known, name=name, topology=topology)
    if topology and known.platform == "tpu":
        _check_chips(target)
    if target.count > MOST_CHIPS:
        raise ValueError(
            f"target must have at most {MOST_CHIPS} devices, got {target.count}"
        )
    return target


def _check_chips(target: Target) -> None:
    sizes = [int(n) for n in target.topology.split("x")]
    if len(sizes) != 2 or any(n % 2 for n in sizes):
        raise ValueError(
            f"target must have two even numbers of chips, such as {target.kind}:4x4, "
            f"got {target.name!r}"
        )


def prepare() -> None:
    """Makes this process one that compiles for targets and computes on the CPU."""
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_traceback_in_locations_limit", 0)


@functools.cache
def _devices(target: Target) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        if target.platform == "gpu":
            sizes = _three(target.topology)
            return topologies.get_topology_desc(
                topology_name=sizes,
                topology=sizes,
                platform="cuda",
                target_config=_hopper(target),
            ).devices
        sizes = target.topology or LEAST_CHIPS
        # As Cloud TPU names them, which keeps libtpu from asking who it is.
        kind = {"v5e": "v5litepod", "v6e": "v6e"}[target.kind]
        chips = math.prod(map(int, sizes.split("x")))
        os.environ["TPU_ACCELERATOR_TYPE"] = f"{kind}-{chips}"
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.kind}:{sizes}"
        ).devices
    except jax.errors.JaxRuntimeError as problem:
        first, *_ = str(problem).splitlines()
        raise ValueError(
            f"target must be one that its compiler knows, got {target.name!r}: {first}"
        ) from problem


def _three(topology: str) -> str:
    """Slices, hosts and GPUs of a host, as XLA names them."""
    sizes = topology.split("x") if topology else []
    return "x".join(["1"] * (3 - len(sizes)) + sizes)


def _hopper(target: Target) -> str:
    """XLA's GpuTargetConfigProto of a GPU of compute capability 9.0."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {target.memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{target.kind}"
"""
