"""Tests run on the CPU unless JAX_PLATFORMS asks for something else."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
