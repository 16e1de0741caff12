"""Tests run on the CPU unless JAX_PLATFORMS asks for something else.

Most of their time goes into compiling what runs once, so XLA leaves out what is slow to
compile, unless XLA_FLAGS already says how well to. `python -m kernels.check` compiles
as users do, and so does the law of `jit`.
"""

import os
import signal
from importlib import metadata

import pytest

# `nohup` ignores it, which processes inherit: tests of it mean a terminal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    FLAGS += " --xla_backend_optimization_level=0"
    FLAGS += " --xla_llvm_disable_expensive_passes=true"
    if metadata.version("jax").startswith("0.10."):  # others do not know it
        FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = FLAGS


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Every program keeps a few memory maps, of which Linux gives a process 65,530: a
    worker that has compiled some thousand programs crashes in the next."""
    yield
    import jax  # tests may set what it reads when it is imported

    jax.clear_caches()
