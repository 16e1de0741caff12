"""A run of seconds for the tests of the training loop, here or in another process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from configs import common
from train import checkpoint, state
from train.metrics import CLOCK, FILE

ROOT = Path(__file__).parents[1]

MODEL = dict(layer="gru", features=4, depth=1, norm="batch", dropout=0.1)
TRAIN = dict(
    steps=12,
    batch_size=8,
    eval_batch_size=40,
    eval_every=5,
    log_every=3,
    checkpoint_every=5,
    ema=0.9,
)


def config(**train):
    """The digits, with everything in the state that can be there."""
    result = common.base()
    result.data.update(name="digits", target="label", augment="shift")
    result.model.update(MODEL)
    result.train.update({**TRAIN, **train})
    return result


def start(
    workdir,
    cache,
    *flags,
    devices=1,
    prefix=(),
    program=("-m", "train.main"),
    **train,
):
    """The same run as a process, its command after `prefix`: its Popen. `program` is
    what Python runs."""
    overrides = {"config.data.augment": "shift"}
    overrides |= {f"config.model.{k}": v for k, v in MODEL.items() if k != "layer"}
    overrides |= {f"config.train.{k}": v for k, v in {**TRAIN, **train}.items()}
    xla_flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{xla_flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [*prefix, sys.executable, *program]
    command += ["--config", f"configs/pixels.py:digits,layer={MODEL['layer']}"]
    command += [f"--{name}={value}" for name, value in overrides.items()]
    command += ["--workdir", str(workdir), "--noreport", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process, code=0, timeout=180):
    """What the process prints, once it has ended with `code`."""
    out, err = process.communicate(timeout=timeout)
    if process.returncode != code:
        raise RuntimeError(f"exit code {process.returncode}\n{out}\n{err}")
    return out, err


def wait_for(condition, process, timeout=120):
    """Waits until `condition()` is true; an error if the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"missed: {process.communicate(timeout=30)}")
        time.sleep(0.001)


def lines(workdir):
    """The lines of metrics.jsonl without the clock."""
    rows = map(json.loads, (Path(workdir) / FILE).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def logged(workdir):
    """How many lines metrics.jsonl has so far."""
    path = Path(workdir) / FILE
    return path.read_text().count("\n") if path.exists() else 0


def assert_same(workdir, other):
    """Two runs are the same, bit by bit."""
    assert lines(workdir) == lines(other)
    assert weights(workdir) == weights(other)


def weights(workdir):
    """The newest checkpoint's step and variables, as path -> bytes."""
    variables, step = checkpoint.restore_params(workdir)
    leaves = state.named_leaves(variables)
    return step, {name: np.asarray(leaf).tobytes() for name, leaf in leaves}
