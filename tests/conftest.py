"""Tests run on the CPU unless JAX_PLATFORMS asks for something else.

Most of their time goes into compiling what runs once, so XLA leaves out what is slow to
compile, unless XLA_FLAGS already says how well to. `python -m kernels.check` compiles
as users do, and so does the law of `jit`.
"""

import os
import re
import signal
import zlib
from importlib import metadata

import pytest

# `nohup` ignores the one, a job in the background of a script the other, and processes
# inherit that: tests of them mean a terminal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
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


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        metavar="K/N",
        type=as_part,
        help="only part K of N of the tests, 1 to N; a test stays in its part",
    )


def as_part(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,4})/([0-9]{1,4})", text)
    k, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= k <= n:
        raise pytest.UsageError(
            f"--part must be K/N with K between 1 and N, such as 2/5, got {text}"
        )
    return k, n


def pytest_collection_modifyitems(config, items):
    """Cases of one test spread over all parts: a digest of its name says in which a
    test is, so that those that come or go move no other."""
    if config.option.part is None:
        return
    k, n = config.option.part
    parts = [zlib.crc32(item.nodeid.encode()) % n + 1 for item in items]
    left_out = [item for item, part in zip(items, parts, strict=True) if part != k]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item, part in zip(items, parts, strict=True) if part == k]
