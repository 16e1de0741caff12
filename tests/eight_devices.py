"""Tests that need eight devices, in a process of their own that emulates them."""

import os
import re
import subprocess
import sys

import jax
import pytest

DEVICES = 8
ALONE = pytest.mark.skipif(len(jax.devices()) > 1, reason="this is that process")
THERE = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="for eight devices")


def passed(file: str, expression: str) -> int:
    """How many tests of a file pass there, of those that pytest's -k takes."""
    flags = os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        [*command, "-k", expression],
        env=os.environ
        | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={DEVICES}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
