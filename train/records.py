"""The files of a run: config, data, versions, results, metrics, and what they mean.

<workdir>/config.json      resolved, as the run began
          data.json        what its data are, so that they need not be there
          versions.json    command, revision, packages and devices of the last start
          metrics.jsonl    see `train.metrics`
          checkpoints/     see `train.checkpoint`
          results.json     of a finished run

Here is also who may go on in a workdir: what of these files has to be the same.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

from train import checkpoint, data, files, metrics, settings
from train.data import described
from train.data.spec import Spec
from train.files import write_atomically
from train.losses import LOSSES

CONFIG = "config.json"

DATA = "data.json"

VERSIONS = "versions.json"

RESULTS = "results.json"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

LATEST = 250_000_000_000  # seconds since 1970 that still are a date

RINGS = ("kernels", "ssm", "layers", "train", "configs")  # where our code is

# What every config has, an object each.
SECTIONS = ("data", "model", "optimizer", "train", "mesh")

# What may change between two starts in one workdir: it does not change what a step
# computes, but for rounding, or (steps) is what a longer run is for. A step that
# skip_nonfinite skips is one that ended the run before: who allows it then goes on.
FREE = (
    "data.workers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "model.remat",
    "model.remat_keeps",
    "pretrain.scratch",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.eval_every",
    "train.keep",
    "train.log_every",
    "train.save_timeout",
    "train.skip_nonfinite",
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
    "model.remat_keeps": ("loops", "loops"),
    "mesh.tensor": (1, 1),
    "train.save_timeout": (0.0, 3600.0),  # it waited for ever
    "train.skip_nonfinite": (0, 0),
    "train.chunk": (0, 0),
    "data.buckets.shortest": (0, 0),  # batches of one length
    "data.buckets.longest": (0, 0),
    "data.buckets.cut": (False, False),
    "data.buckets.curriculum": ("natural", "natural"),
    "data.buckets.cycles": (1, 1),
    # Their section was not there: what they are does not matter where steps is 0.
    "pretrain.steps": (0, 0),
    "pretrain.objective": ("masked", "masked"),
    "pretrain.ratio": (0.5, 0.5),
    "pretrain.levels": (0, 0),
    "pretrain.low": (0.0, 0.0),
    "pretrain.high": (1.0, 1.0),
    "pretrain.lr": (0.0, 0.0),
    "pretrain.batch_size": (0, 0),
    "pretrain.scratch": (False, False),
}
# The same of the arguments of a dataset, by its name.
ABSENT_DATA = {
    "arrays": {
        "data.rate": (0, 0),
        "data.length": (0, 0),
        "data.label": ("", ""),
        "data.normalise": (False, True),
    }
}

# What `configs/own.py` set otherwise when an older run began: (all that it was, today).
# Such a run goes on with its own where the config has today's.
OWN_RECIPE = {"optimizer.lr": ((1e-3, 4e-3), 1e-2)}


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises a `ValueError` where checkpoints of another config are in `workdir`.

    It names the keys, other than FREE, whose values differ.
    """
    if checkpoint.steps(workdir) and (workdir / CONFIG).exists():
        old, now = (flat(c.to_dict()) for c in (read_config(workdir), _plain(config)))
        # A config of the user's own may lack what an older run's does.
        now = {key: today for key, (_, today) in _absent(config).items()} | now
        free = {*FREE}
        if now.get("pretrain.steps"):  # where its weights are follows from the workdir
            free.add("train.init_from")
        differing = [
            f"{key} was {old.get(key)!r}, is {now.get(key)!r}"
            for key in sorted({*old, *now} - free)
            if old.get(key) != now.get(key)
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds a run of another config ({'; '.join(differing)}): "
                "give another --workdir, or the values it began with"
            )


def check_data(workdir: Path, dataset: data.Dataset) -> None:
    """Raises a `ValueError` where checkpoints of other data are in `workdir`, or where
    a damaged file says what theirs were."""
    try:
        kept = read_data(workdir) if checkpoint.steps(workdir) else None
    except ValueError as problem:
        # Nothing else tells whether the data are still those: that is for the user.
        raise ValueError(
            f"{problem}; if the data are those that the run began with, remove the "
            "file, and it is written anew"
        ) from problem
    changed = "" if kept is None else described.differing(kept, dataset.spec)
    if changed:
        raise ValueError(
            f"{workdir} holds a run of other data ({changed}): give another --workdir, "
            "or the data it began with"
        )


def check_writable(workdir: Path) -> None:
    """Raises a `ValueError` where something is in the way of what a run writes.

    Before compiling, not after.
    """
    for name in (CONFIG, DATA, VERSIONS, RESULTS, metrics.FILE):
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
    return flat(read_config(workdir).to_dict()).get(key)


def continued(
    workdir: Path, config: ConfigDict, typed: Collection[str] = ()
) -> ConfigDict:
    """`config` as an older run in `workdir` understands it: keys that its config.json
    lacks take their meaning in ABSENT, unless they are not at today's default, and
    those of OWN_RECIPE what they were. What was `typed` means what it says."""
    if not (checkpoint.steps(workdir) and (workdir / CONFIG).exists()):
        return config
    old, now = (flat(c.to_dict()) for c in (_read(workdir), _plain(config)))
    config = config.copy_and_resolve_references()
    for key, (meaning, default) in _absent(config).items():
        if key not in {*old, *typed} and now.get(key) == default != meaning:
            _set(config, key, meaning)
            print(f"{workdir} began before there was {key}: it keeps {meaning!r}")
    name = config.data.get("name")
    if name == "arrays" or name not in data.DATASETS:
        for key, (earlier, today) in OWN_RECIPE.items():
            then = old.get(key)
            if key not in typed and now.get(key) == today and then in earlier:
                _set(config, key, then)
                print(f"{workdir} began with {key} = {then}: it keeps that")
    return config


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` that of a run of `config`, as it was resolved."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(config).to_dict(), indent=2)
        write_atomically(workdir / CONFIG, text + "\n")


def read_config(workdir: str | Path) -> ConfigDict:
    """The resolved config of the run in `workdir`, keys that it lacks as in ABSENT.

    Raises:
        ValueError: there is none, or a value is not of its type.
    """
    workdir = settings.place("workdir", workdir)
    config = _read(workdir)
    absent = _absent(config)
    for key in absent.keys() - flat(config.to_dict()).keys():
        _set(config, key, absent[key][0])
    try:
        settings.check_types(config)
    except ValueError as problem:
        raise ValueError(f"{workdir / CONFIG}: {problem}") from problem
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


def write_data(
    workdir: Path, dataset: data.Dataset, said: Mapping | None = None
) -> None:
    """Keeps what the data of a run are in `workdir`, unless its run has begun before.

    Args:
        workdir: of the run.
        dataset: that it trains on.
        said: more about the data, as JSON knows it.
    """
    if jax.process_index():
        return
    if checkpoint.steps(workdir) and (workdir / DATA).exists():
        return  # `check_data` has found them to be the same
    found = described.described(dataset) | ({} if said is None else {"said": {**said}})
    write_atomically(workdir / DATA, json.dumps(found, indent=2) + "\n")


def read_data(workdir: str | Path) -> Spec | None:
    """What the data of the run in `workdir` are; None for a run that kept no data.json.

    Raises:
        ValueError: the file is damaged, or its values cannot be.
    """
    path = Path(workdir) / DATA
    found = files.read_json(path)
    return None if found is None else described.spec_of(path, found)


def read_said(workdir: str | Path) -> dict:
    """What the run has kept of its data beside their spec; {} where it has not.

    Raises:
        ValueError: the file cannot be read.
    """
    found = files.read_json(Path(workdir) / DATA)
    said = found.get("said") if isinstance(found, Mapping) else None
    return dict(said) if isinstance(said, Mapping) else {}


def _absent(config: ConfigDict) -> dict:
    """The rows of ABSENT and ABSENT_DATA that are about a config."""
    name = config.data.get("name")
    return ABSENT | (ABSENT_DATA.get(name, {}) if isinstance(name, str) else {})


def _set(config: ConfigDict, key: str, value) -> None:
    """Gives a dotted key its value, there already or not."""
    *sections, name = key.split(".")
    for section in sections:
        if section not in config:  # of an older run
            with config.unlocked():
                config[section] = ConfigDict()
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
        "packages": _packages(),
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }
    write_atomically(workdir / VERSIONS, json.dumps(versions, indent=2) + "\n")


def code() -> dict:
    """What the processes of a run must have in common beside its config: revision,
    sources, packages."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for ring in RINGS for p in (root / ring).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {
        "revision": _git("rev-parse", "HEAD"),
        "sources": digest.hexdigest()[:12],
        "python": platform.python_version(),
        **_packages(),
    }


def _packages() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


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
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"{path}: loss must be one of {[*LOSSES]}, got {loss!r:.60}")
    if best is not None and not (
        isinstance(best, dict) and type(best.get("step")) is int
    ):
        raise ValueError(f"{path}: best must have a step, got {best!r:.60}")
    name = LOSSES[loss].metric
    tables = {"test": found.get("test")}
    if best is not None:
        tables |= {f"best.{key}": best.get(key) for key in ("validation", "test")}
        if best.get("validation") is None:
            raise ValueError(f"{path}: best.validation must be an object, got None")
    for key, scores in tables.items():
        number = isinstance(scores, dict) and isinstance(scores.get(name), int | float)
        if scores is not None and not number:
            raise ValueError(f"{path}: {key} must have {name}, got {scores!r:.60}")
    for key in ("parallel_vs_recurrent", "checkpoint"):
        if key not in found:
            raise ValueError(f"{path} must have {key}, and has not")
    return found


def finished(workdir: Path, config: ConfigDict) -> dict | None:
    """The results of a run that is finished, printed; None where there is more to do.

    Raises:
        ValueError: a workdir of another config.
    """
    check_workdir(workdir, config)
    try:
        found = read_results(workdir)
    except ValueError as problem:  # they are made again at the end
        print(f"{problem}: the run goes on from its last checkpoint", flush=True)
        return None
    if found is None or found["step"] < config.train.steps:
        return None
    print(f"this run was finished before, at step {found['step']}")
    metrics.print_results(found)
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


def values(config: ConfigDict) -> dict:
    """The values of a config by their dotted keys, as JSON knows them."""
    return flat(_plain(config).to_dict())


def _plain(config: ConfigDict) -> ConfigDict:
    """As JSON gives it back: tuples become lists."""
    return ConfigDict(json.loads(json.dumps(config.to_dict())))


def flat(tree: Mapping, prefix: str = "") -> dict:
    """The values of mappings within mappings by their dotted keys."""
    values = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _git(*arguments: str) -> str | None:
    """The answer of git about this repository; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
