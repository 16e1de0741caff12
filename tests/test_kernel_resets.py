"""A reset cuts whatever lies before it: NaN, infinity, what overflows.

Triton's interpreter must be asked for before anything is imported, so its backends are
tried in a process of their own, which is this file as a script.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.check.cases import OPERATIONS, Case

SEQUENCES = {  # what has a row per token
    "linear_scan": ("a", "x"),
    "contracted_scan": ("u", "dt"),
    "selective_scan": ("u", "dt", "B", "C"),
    "chunked_scan": ("q", "k", "v", "log_decay", "beta"),
    "fft_conv": ("u", "pre_gate", "post_gate"),
    "short_conv": ("u",),
}
QUICK = [
    ("linear_scan", "real", "xla"),
    ("selective_scan", "skip", "xla"),
    ("chunked_scan", "delta rule, scalar decay", "xla"),
    ("fft_conv", "gated", None),
    ("short_conv", "bias", "xla"),
]
SLOW = [
    ("linear_scan", "real", "reference"),
    ("linear_scan", "real", "pallas_tpu"),
    ("contracted_scan", "complex, dt", "xla"),
    ("chunked_scan", "vector decay", "xla"),
    ("linear_scan", "complex", "xla"),
    ("linear_scan", "complex", "reference"),
    ("linear_scan", "complex", "pallas_tpu"),
    ("contracted_scan", "complex", "xla"),
    ("contracted_scan", "complex, dt", "reference"),
    ("selective_scan", "skip", "reference"),
    ("selective_scan", "skip", "pallas_tpu"),
    ("chunked_scan", "scalar decay", "xla"),
    ("chunked_scan", "scalar decay", "reference"),
    ("chunked_scan", "delta rule, scalar decay", "reference"),
    ("fft_conv", "gated", "xla"),
    ("short_conv", "bias", "reference"),
    ("short_conv", "bias", "pallas_tpu"),
]


class Trial:
    """An operation on two rows, the first with something bad and a reset.

    The bad stands at `bad`, the reset at `reset`; `before` and `after` are the tokens
    which that must not reach.
    """

    def __init__(self, name, variant, backend, length=6, bad=1, reset=3, chunk=1):
        operation = OPERATIONS[name]
        arrays = operation.inputs(Case(variant, length, state=True))
        self.inputs = jax.tree.map(jnp.asarray, arrays)
        self.names = [n for n in SEQUENCES[name] if n in arrays]
        self.length, self.bad, self.at = length, bad, reset
        self.before = slice(0, reset // chunk * chunk)
        self.after = slice(-(-reset // chunk) * chunk, None)
        self.reset = np.zeros((2, length), bool)
        self.reset[0, reset] = True
        self.operation, self.backend = operation.call, backend
        self.compiled = jax.jit(self._run)
        self.good = self.run()

    def _run(self, moving, reset, cotangent):
        def call(moving):
            return self.operation(**moving, reset=reset, backend=self.backend)

        (y, final), pull = jax.vjp(call, moving)
        dy = cotangent.reshape(2, -1, *[1] * (y.ndim - 2)) * jnp.ones_like(y)
        return y, final, pull((dy, jnp.ones_like(final)))[0]

    def run(self, cotangent=None, **changed):
        """Outputs, final state and gradients."""
        if cotangent is None:
            cotangent = np.ones((2, self.length), np.float32)
        return self.compiled(self.inputs | changed, self.reset, cotangent)

    def check_gradients(self, results, clean):
        for n in self.names:
            for row, part in ((0, clean), (1, slice(None))):
                close(results[2][n][row, part], self.good[2][n][row, part], n)

    def check(self, results):
        """After the reset, and in the other row, it is as if nothing were bad."""
        close(results[0][0, self.after], self.good[0][0, self.after], "output")
        close(results[0][1], self.good[0][1], "other row")
        close(results[1], self.good[1], "final state")
        self.check_gradients(results, self.after)

    def check_inputs(self):
        for n in self.names:
            # a log decay is not positive
            for value in (np.nan,) if n == "log_decay" else (np.nan, 3e38):
                results = self.run(**{n: self.inputs[n].at[0, self.bad].set(value)})
                self.check(results)
                assert np.isnan(results[0][0, self.bad]).any() or value > 0
        state = self.inputs["initial_state"].at[0].set(np.nan)
        self.check(self.run(initial_state=state))

    def check_cotangent(self, at, clean):
        cotangent = np.ones((2, self.length), np.float32)
        cotangent[0, at] = np.nan
        results = self.run(cotangent)
        self.check_gradients(results, clean)
        assert any(np.isnan(results[2][n][0, at]).any() for n in self.names)


def close(actual, expected, name):
    np.testing.assert_allclose(actual, expected, 1e-3, 1e-3, err_msg=name)


def everything(trial):
    trial.check_inputs()
    trial.check_cotangent(trial.bad, trial.after)
    trial.check_cotangent(trial.at + 1, trial.before)


@pytest.mark.parametrize(
    ("name", "variant", "backend"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_nothing_passes_a_reset(name, variant, backend):
    everything(Trial(name, variant, backend))


@pytest.mark.parametrize(
    "variant", ["scalar decay", pytest.param("delta rule, scalar decay",
                                             marks=pytest.mark.slow)]
)  # fmt: skip
def test_nothing_but_a_chunk_of_matmuls_passes_a_reset(variant, monkeypatch):
    module = import_module("kernels.chunked_scan.pallas_tpu")
    monkeypatch.setattr(module, "CHUNK", 16)
    chunkwise(variant, "pallas_tpu")


def chunkwise(variant, backend):
    """In the chunk before that of the reset, and in the same."""
    for bad in (1, 16):
        sizes = {"length": 48, "bad": bad, "reset": 18, "chunk": 16}
        trial = Trial("chunked_scan", variant, backend, **sizes)
        trial.check_inputs()
        trial.check_cotangent(trial.bad, trial.after)
        if not variant.startswith("delta rule"):  # a system over the chunk
            trial.check_cotangent(trial.at + 1, trial.before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_scan", "chunked_scan", "selective_scan"])
def test_nothing_passes_a_reset_on_a_gpu(name):
    pytest.importorskip("triton", reason="not installed: pip install -e '.[test]'")
    root = Path(__file__).parents[1]
    process = subprocess.run(
        [sys.executable, __file__, name],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=900,  # of a hang; takes a minute
    )
    assert process.returncode == 0, process.stderr


def interpreted(name):
    if name == "linear_scan":
        everything(Trial(name, "real", "triton"))
        everything(Trial(name, "complex", "triton"))
    elif name == "selective_scan":
        import_module("kernels.selective_scan.triton").SEGMENT = 4
        everything(Trial(name, "skip", "triton", length=12, reset=6))
    else:
        module = import_module("kernels.chunked_scan.triton_decay")
        module.CHUNK = 32  # half of it in float32
        module.FEW = 0  # two walks
        chunkwise("delta rule, scalar decay", "triton")
        chunkwise("scalar decay", "triton")
        module.FEW = 100  # one
        chunkwise("scalar decay", "triton")


if __name__ == "__main__":
    interpreted(sys.argv[1])
