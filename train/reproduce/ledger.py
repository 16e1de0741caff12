"""What a reproduction keeps: runs trained once, their seconds, and the machine."""

import json
import platform
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from train import files, pretrain

SECONDS = "seconds.json"


def machine() -> str:
    """What the seconds of a table were measured on."""
    device = jax.devices()[0].device_kind
    place = f"{device} ({platform.machine()}, {len(jax.devices())} device)"
    return f"{place}, jax {jax.__version__}"


def trained(config: ConfigDict, workdir: Path) -> dict:
    """One finished run: its results, and the seconds it took, compilation included."""
    start = time.monotonic()
    results = pretrain.run(config, workdir)
    if "stopped" in results:  # by SIGTERM or Ctrl-C; the next start goes on from here
        raise SystemExit(0)
    path = workdir / SECONDS
    if not path.exists():
        seconds = time.monotonic() - start
        files.write_atomically(path, json.dumps(seconds))
    return results | {"seconds": files.read_json(path, float)}
