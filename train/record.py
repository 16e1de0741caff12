"""What a run says about itself: config, versions and results, in files and in print."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

from configs.common import GROUP_NAMES
from train import checkpoint, files, metrics
from train.files import write_atomically

CONFIG = "config.json"
VERSIONS = "versions.json"
RESULTS = "results.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

LATEST = 250_000_000_000  # seconds since 1970 that still are a date

# What every config has, an object each.
SECTIONS = ("data", "model", "optimizer", "train", "mesh")

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


def check_writable(workdir: Path) -> None:
    """Raises a `ValueError` where something is in the way of what a run writes.

    Before compiling, not after.
    """
    for name in (CONFIG, VERSIONS, RESULTS, metrics.FILE):
        path = workdir / name
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} must be a file, got a folder: move it away")
    for name in (checkpoint.FOLDER, metrics.BOARD, "profile"):
        path = workdir / name
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} must be a folder, got a file: move it away")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise ValueError(f"{path} must be a folder that can be read and written")


def saved(workdir: Path, key: str):
    """What the run in `workdir` that has a checkpoint began with, such as for "seed";
    None without one."""
    if not checkpoint.steps(workdir) or not (workdir / CONFIG).exists():
        return None
    return _flat(read_config(workdir).to_dict()).get(key)


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
    found = files.read_json(path)
    if found is None:
        raise ValueError(f"workdir must be that of a run, got {workdir}: no {CONFIG}")
    for section in SECTIONS:
        if not isinstance(found.get(section), dict):
            raise ValueError(
                f"{path}: {section} must be an object, got {found.get(section)!r:.60}"
            )
    return ConfigDict(found)


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
    factors = dict(config.groups)
    counts = [
        (group_name(pattern, factors[pattern]), sum(map(sizes.get, paths)))
        for pattern, paths in groups.items()
    ]
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
    # A user's pattern can be long; the numbers stay readable beside it.
    width = min(max(len(name) for name, _ in rows), 60)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", flush=True)


def group_name(pattern: str, factors: Mapping) -> str:
    """A parameter group in words: what it is, where the configs say so of `pattern`,
    and how it learns."""
    lr, wd = factors.get("lr", 1.0), factors.get("wd", 1.0)
    how = [f"lr x {lr:.3g}"] * (lr not in (0, 1))
    how += [f"decay x {wd:.3g}" if wd else "no decay"] * (wd != 1)
    how = "frozen" if lr == 0 else ", ".join(how)
    name = GROUP_NAMES.get(pattern, f"what matches {pattern}")
    return f"{name} ({how})" if how else name


def read_results(workdir: str | Path) -> dict | None:
    """What `write_results` wrote; None in a run that is not finished.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    path = Path(workdir) / RESULTS
    found = files.read_json(path)
    if found is None:
        return None
    step, loss, best = (found.get(key) for key in ("step", "loss", "best"))
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: step must be a whole number, got {step!r:.60}")
    if not isinstance(loss, str) or loss not in SCORES:
        raise ValueError(f"{path}: loss must be one of {[*SCORES]}, got {loss!r:.60}")
    if best is not None and not (
        isinstance(best, dict) and type(best.get("step")) is int
    ):
        raise ValueError(f"{path}: best must have a step, got {best!r:.60}")
    name = SCORES[loss][0]
    tables = {"test": found.get("test")}
    if best is not None:
        tables |= {f"best.{key}": best.get(key) for key in ("validation", "test")}
        if best.get("validation") is None:
            raise ValueError(f"{path}: best.validation must be an object, got None")
    for key, scores in tables.items():
        number = isinstance(scores, dict) and isinstance(scores.get(name), int | float)
        if scores is not None and not number:
            raise ValueError(f"{path}: {key} must have {name}, got {scores!r:.60}")
    _check_rollout(path, found.get("rollout"))
    for key in ("parallel_vs_recurrent", "checkpoint"):
        if key not in found:
            raise ValueError(f"{path} must have {key}, and has not")
    return found


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; a kill may have cut the last one off.

    Raises:
        ValueError: the file or another line cannot be read.
    """
    path, rows = Path(workdir) / metrics.FILE, []
    lines = files.read_lines(path)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(path, number, line))
        except ValueError:
            if number < len(lines):
                raise
    return rows


def _row(path: Path, number: int, line: str) -> dict:
    try:
        found = json.loads(line)
        step, split, *rest = found["step"], found["split"], *found.values()
        numbers = [value for value in rest if value is not split]
        whole = type(step) is int and 0 <= step < 2**63 and isinstance(split, str)
        numeric = all(isinstance(value, int | float) for value in numbers)
        if whole and numeric and 0 <= found.get("time", 0) < LATEST:
            return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{path}: line {number} must be a JSON object with step and split, the rest "
        f"numbers, got {files.quoted(line)}"
    )


def _check_rollout(path: Path, found) -> None:
    """Raises a `ValueError` unless that is None or the summary of a rollout."""
    if found is None:
        return
    scores = found.get("scores") if isinstance(found, dict) else None
    tables = scores.values() if isinstance(scores, dict) else [None]
    lists = [v for t in tables for v in (t.values() if isinstance(t, dict) else [None])]
    numbers = lists and all(
        isinstance(values, list)
        and len(values) == len(lists[0]) > 0
        and all(isinstance(x, int | float) for x in values)
        for values in lists
    )
    if (
        "model" not in (scores or ())
        or not numbers
        or not {"clips", "split"} <= {*found}
    ):
        raise ValueError(
            f"{path}: rollout must have clips, split and scores, lists of numbers by "
            f"name and metric, got {found!r:.60}"
        )


def read_versions(workdir: str | Path) -> dict:
    """What `write_versions` wrote; {} where it did not. `ValueError` for other text."""
    path = Path(workdir) / VERSIONS
    found = files.read_json(path) or {}
    devices = found.get("devices") or []
    if not isinstance(devices, list) or not all(isinstance(d, str) for d in devices):
        raise ValueError(
            f"{path}: devices must be a list of names, got {devices!r:.60}"
        )
    return found


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
