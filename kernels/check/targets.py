"""Accelerators that need not be here, for whose own compilers programs are compiled.

libtpu and JAX's plugin for CUDA compile for a device that is only described to them.
What they make cannot be run, but it says what it needs: seconds to compile, bytes, and
whether it compiles at all.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import jax

# Of the process: without a TPU there is nothing to ask for its name, and who compiles
# only may do so beside others, whatever lock an earlier process has left.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Target:
    """One accelerator.

    Attributes:
        name: on the command line.
        platform: "tpu" or "gpu", as in `compat.platform()`.
        kind: what the compiler calls it.
        memory: of the device, in bytes.
        bandwidth: of that memory, bytes per second.
    """

    name: str
    platform: str
    kind: str
    memory: int
    bandwidth: int

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

    def device(self) -> jax.Device:
        """The first of such devices."""
        return _devices(self)[0]


TARGETS = {
    target.name: target
    for target in (
        Target("tpu:v5e", "tpu", "v5e:2x2", 16 * 2**30, 819 * 10**9),
        Target("tpu:v6e", "tpu", "v6e:2x2", 32 * 2**30, 1640 * 10**9),
        Target("gpu:h100", "gpu", "NVIDIA H100", 85 * 10**9, 3350 * 10**9),
        Target("gpu:h200", "gpu", "NVIDIA H200", 150 * 10**9, 4800 * 10**9),
    )
}


def prepare() -> None:
    """Makes this process one that compiles for targets and computes on the CPU."""
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def _devices(target: Target) -> list[jax.Device]:
    from jax.experimental import topologies

    if target.platform == "tpu":
        names = {"v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4"}
        os.environ["TPU_ACCELERATOR_TYPE"] = names[target.kind]
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=target.kind
        )
    else:
        topology = topologies.get_topology_desc(
            topology_name="1x1x1",
            topology="1x1x1",
            platform="cuda",
            target_config=_hopper(target),
        )
    return topology.devices


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
