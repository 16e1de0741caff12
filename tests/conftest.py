"""Tests run on the CPU unless JAX_PLATFORMS asks for something else."""

import os
import signal

import pytest

# `nohup` ignores it, which processes inherit: tests of it mean a terminal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Every program keeps a few memory maps, of which Linux gives a process 65,530: a
    worker that has compiled some thousand programs crashes in the next."""
    yield
    import jax  # tests may set what it reads when it is imported

    jax.clear_caches()
