"""What a reproduction keeps: runs trained once, their seconds, and the machine."""

import json
import platform
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from train import files, loop

SECONDS = "seconds.json"


def machine() -> str:
    """What the seconds of a table were measured on."""
    device = jax.devices()[0].device_kind
    where = f"{device} ({platform.machine()}, {len(jax.devices())} device)"
    return f"{where}, jax {jax.__version__}"


def trained(config: ConfigDict, workdir: Path) -> dict:
    """One finished run: its results, and the seconds it took, compilation included."""
    begun = time.monotonic()
    results = loop.run(config, workdir)
    if "stopped" in results:  # by SIGTERM or Ctrl-C; the next start goes on from here
        raise SystemExit(0)
    kept = workdir / SECONDS
    if not kept.exists():
        seconds = time.monotonic() - begun
        files.write_atomically(kept, json.dumps(seconds))
    return results | {"seconds": files.read_json(kept, float)}
