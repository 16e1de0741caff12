"""What a run says about itself: config, versions and results, in files and in print."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

from train import checkpoint
from train.checkpoint import write_atomically

CONFIG = "config.json"
VERSIONS = "versions.json"
RESULTS = "results.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may change between two starts in one workdir: it does not change what a step
# computes, or (steps) is what a longer run is for.
FREE = (
    "data.workers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.eval_every",
    "train.keep",
    "train.log_every",
    "train.steps",
)

# What it means that the config.json of an older run lacks a key, always what the code
# did then: (meaning, today's default). Reading such a run fills the meaning in, and
# going on with it keeps it where the config still has the default.
ABSENT = {
    "model.gelu": ("tanh", ""),
    "model.norm_epsilon": (0.0, -1.0),
    "model.grid": ("", ""),
    "model.patch": (1, 1),
}

# The metric that chooses the best step, its name at the end, whether more is better.
SCORES = {
    "classification": ("accuracy", "accuracy", True),
    "token": ("accuracy", "accuracy", True),
    "regression": ("loss", "error", False),
    "frames": ("mse", "mse", False),
    "codes": ("accuracy", "accuracy", True),
    "autoencoder": ("mse", "mse", False),
}


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises a `ValueError` where checkpoints of another config are in `workdir`.

    It names the keys, other than FREE, whose values differ.
    """
    if checkpoint.steps(workdir) and (workdir / CONFIG).exists():
        old, flat = (_flat(c.to_dict()) for c in (read_config(workdir), _plain(config)))
        differing = [
            f"{key} was {old.get(key)!r}, is {flat.get(key)!r}"
            for key in sorted({*old, *flat} - {*FREE})
            if old.get(key) != flat.get(key)
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds a run of another config ({'; '.join(differing)}): "
                "give another --workdir, or the values it began with"
            )


def continued(workdir: Path, config: ConfigDict) -> ConfigDict:
    """`config` as an older run in `workdir` understands it: keys that its config.json
    lacks take their meaning in ABSENT, unless they are not at today's default."""
    if not (checkpoint.steps(workdir) and (workdir / CONFIG).exists()):
        return config
    old, now = (_flat(c.to_dict()) for c in (_read(workdir), _plain(config)))
    config = config.copy_and_resolve_references()
    for key, (meaning, default) in ABSENT.items():
        if key not in old and now.get(key) == default != meaning:
            _set(config, key, meaning)
            print(f"{workdir} began before there was {key}: it keeps {meaning!r}")
    return config


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` that of a run of `config`, as it was resolved."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(config).to_dict(), indent=2)
        write_atomically(workdir / CONFIG, text + "\n")


def read_config(workdir: str | Path) -> ConfigDict:
    """The resolved config of the run in `workdir`, keys that it lacks as in ABSENT;
    `ValueError` if there is none."""
    config = _read(workdir)
    for key in ABSENT.keys() - _flat(config.to_dict()).keys():
        _set(config, key, ABSENT[key][0])
    return config


def _read(workdir: str | Path) -> ConfigDict:
    path = Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"workdir must be that of a run, got {workdir}: no {CONFIG}")
    return ConfigDict(json.loads(path.read_text()))


def _set(config: ConfigDict, key: str, value) -> None:
    """Gives a dotted key its value, there already or not."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.unlocked(), config.ignore_type():
        config[name] = value


def write_versions(workdir: Path) -> None:
    """Writes what this start runs on: revision, packages, devices."""
    if jax.process_index():
        return
    versions = {
        "command": ["python", *sys.orig_argv[1:]],
        "git": {
            "revision": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain")),
        },
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_atomically(workdir / VERSIONS, json.dumps(versions, indent=2) + "\n")


def machine() -> str:
    """What the seconds of a table were measured on."""
    device = jax.devices()[0].device_kind
    where = f"{device} ({platform.machine()}, {len(jax.devices())} device)"
    return f"{where}, jax {jax.__version__}"


def print_table(
    config: ConfigDict, groups: Mapping[str, list[str]], params, mesh, compiled, seconds
) -> None:
    """Parameters by group, floating-point operations, devices.

    Args:
        config: the run's.
        groups: pattern -> paths of its parameters.
        params: tree of shapes.
        mesh: of the devices.
        compiled: the train step.
        seconds: that compiling it took.
    """
    named = checkpoint.named_leaves(params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in named}
    counts = [(name, sum(map(sizes.get, paths))) for name, paths in groups.items()]
    flops = (compiled.cost_analysis() or {}).get("flops", math.nan)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = [
        ("layer", f"{config.model.layer}, {config.model.depth} deep"),
        ("parameters", f"{sum(sizes.values()):,}"),
        *[(f"  {name}", f"{count:,}") for name, count in counts if count],
        ("FLOPs per step", f"{flops:.3g}"),
        ("compiled in", f"{seconds:.1f} s"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        ("mesh", shape),
    ]
    # Patterns of groups can be long; the numbers stay readable beside them.
    width = min(max(len(name) for name, _ in rows), 40)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", flush=True)


def read_results(workdir: Path) -> dict | None:
    """What `write_results` wrote; None in a run that is not finished."""
    path = workdir / RESULTS
    return json.loads(path.read_text()) if path.exists() else None


def write_results(workdir: Path, results: Mapping) -> None:
    """Marks the run as finished."""
    if jax.process_index() == 0:
        write_atomically(workdir / RESULTS, json.dumps(results, indent=2) + "\n")


def report(results: Mapping) -> None:
    """Prints the lines at the end of a run."""
    name, label, _ = SCORES[results["loss"]]
    if results["test"]:
        print(f"test {label}: {results['test'][name]:.4f}")
    best = results["best"]
    if best and best["test"]:
        print(
            f"best on validation, step {best['step']}: validation {label} "
            f"{best['validation'][name]:.4f}, test {label} {best['test'][name]:.4f}"
        )
    difference = results["parallel_vs_recurrent"]
    if isinstance(difference, float):
        print(f"parallel vs recurrent: max difference {difference:.1e}")
    else:
        print(f"parallel vs recurrent: no recurrent mode ({difference})")
    print(f"checkpoint: {results['checkpoint']}", flush=True)


def _plain(config: ConfigDict) -> ConfigDict:
    """As JSON gives it back: tuples become lists."""
    return ConfigDict(json.loads(json.dumps(config.to_dict())))


def _flat(tree: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _git(*arguments: str) -> str | None:
    """The answer of git about this repository; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
