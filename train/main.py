"""Trains what a config file says.

    python -m train.main --config pixels:digits,layer=s5 --config.seed=1
    python -m train.main --config my/config.py

A name alone is one of `configs/`. The same command again goes on with a run that was
stopped.
"""

import contextlib
import errno
import multiprocessing
import os
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import configs
from train import hosts, layer_flags, runs, settings
from train.signals import Stopped, check, stop_signals

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "FILE[:ARGUMENT] or NAME[:ARGUMENT], such as pixels:digits; --config.KEY=VALUE "
    "changes a value",
    lock_config=True,
)
# Where a flag sets a field of a layer of the user's own, its class says what there is.
FIELDS = layer_flags.OwnFields(flags.FLAGS["config"].parser)
flags.FLAGS["config"].parser = FIELDS
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run lives; default runs/<config>-<argument>-<seed>"
)
SEEDS = flags.DEFINE_list("seeds", [], "several runs, such as 0,1,2, one after another")
PROFILE = flags.DEFINE_bool("profile", False, "trace steps 2 to 6 to <workdir>/profile")
REPORT = flags.DEFINE_bool("report", True, "write <workdir>/report.html at the end")
LENGTHS = flags.DEFINE_string(
    "lengths", None, "at the end also test at so many training lengths, as 1,2,4,8"
)
CERTIFICATE = flags.DEFINE_string(
    "certificate",
    None,
    "of python -m kernels.check; default runs/kernels/<device kind>.json if it exists",
)
# No key of the config: the folder is the machine's, not the experiment's, and holds
# programs that are run unread, so that no run from elsewhere may name it.
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "folder where JAX keeps compiled programs for the next start; default none, or "
    "what JAX_COMPILATION_CACHE_DIR says",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where a run has several processes"
)
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes a run has")
PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "one of several hosts, found as JAX finds them; SLURM, TPU pods in Kubernetes and "
    "JAX_COORDINATOR_ADDRESS are noticed without it",
)
START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300.0, "seconds in which all processes must have come"
)
STOPPED_CODE = flags.DEFINE_integer(
    "stopped_code",
    0,
    "exit code of a run that a signal stopped, for schedulers that take 0 for finished",
    lower_bound=0,
    upper_bound=125,
)
LOST_AFTER = flags.DEFINE_float(
    "lost_after", 30.0, "seconds after which a silent process is lost: the others end"
)
flags.DEFINE_bool("debug", False, "show where in the code an error arose")


WEEK = 7 * 24 * 3600.0
FULL = (errno.ENOSPC, errno.EDQUOT)
HELP = re.compile(r"--?(h|\?|help|helpshort|helpfull|helpxml)(=true)?", re.IGNORECASE)


def main(argv: list[str]) -> int:
    check_arguments(argv)
    # Here and not above: a mistyped flag is answered before JAX has started.
    import jax

    from kernels import allocator
    from train import processes

    if __name__ == "__main__":  # the process of who imports this is theirs
        allocator.keep_freed_memory()
    with stop_signals() as stop:
        stop.code = STOPPED_CODE.value
    bounds = START_TIMEOUT.value, LOST_AFTER.value
    with hosts.joined(place(), DISTRIBUTED.value, *bounds):
        code = _train(jax)
        processes.of_all(code)  # none parts while process 0 still writes
        return code


def place() -> hosts.Place | None:
    """Where this process is among those that the flags and variables tell of."""
    return hosts.find(COORDINATOR.value, PROCESSES.value, PROCESS.value)


def _train(jax) -> int:
    from train import data, evaluate, exclusions, pretrain, processes

    said = {flag.name: flag.value for flag in (SEEDS, LENGTHS, PROFILE)}
    processes.check_same("command line", said)
    if COMPILATION_CACHE.value:
        folder = settings.place("--compilation_cache", COMPILATION_CACHE.value)
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    exclusions.apply(CERTIFICATE.value)
    seeds = [_number(seed) for seed in SEEDS.value] or [CONFIG.value.seed]
    if len({*seeds}) < len(seeds):
        raise ValueError(f"--seeds must name a seed once, got {','.join(SEEDS.value)}")
    times = () if LENGTHS.value is None else evaluate.parse_times(LENGTHS.value)
    for n in times:  # now, not after hours
        data.stretched(CONFIG.value.data, n)
    outcomes, typed = {}, config_flags.get_override_values(flags.FLAGS["config"])
    for seed in seeds:
        config = CONFIG.value.copy_and_resolve_references()
        config.seed = seed
        workdir = _workdir(seed, len(seeds) > 1)
        for path in (workdir, *workdir.parents):
            if os.path.exists(path) and not os.path.isdir(path):
                raise ValueError(f"--workdir must be a folder, got the file {path}")
        print(f"workdir: {workdir}", flush=True)
        outcomes[seed] = pretrain.run(config, workdir, PROFILE.value, typed=[*typed])
        if "stopped" in outcomes[seed]:
            return STOPPED_CODE.value
        if times:
            # Its layer is that of the command line, which has been trained here.
            run = runs.load_run(workdir, trust=True)
            evaluate.at_lengths(run, workdir, "test", times)
        if REPORT.value and jax.process_count() == 1:
            _write_report(workdir)
        elif REPORT.value:
            print(f"report: python -m train.report --workdir {workdir}", flush=True)
        check()
    if len(seeds) > 1:
        _print_seeds(outcomes)
    return 0


def check_arguments(argv: list[str]) -> None:
    """Raises a `ValueError` for positional arguments, or without --config."""
    if len(argv) > 1:
        raise ValueError(f"arguments must be flags, got {argv[1:]}")
    if CONFIG.value is None:
        raise ValueError("--config is missing, such as --config pixels:digits")
    for flag in (START_TIMEOUT, LOST_AFTER):
        if not 1 <= flag.value <= WEEK:
            raise ValueError(
                f"--{flag.name} must be seconds from 1 to a week, got {flag.value}"
            )
    place()
    settings.check_types(CONFIG.value)
    settings.place("--workdir", WORKDIR.value or "")
    cache = settings.place("--compilation_cache", COMPILATION_CACHE.value or "")
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"--compilation_cache must be a folder, got the file {cache}")


def _write_report(workdir: Path) -> None:
    """The run's page; what keeps it from being written never fails the run."""
    try:
        from train.report import pages

        with stop_signals() as stop:
            stop.ends_after("section of the report")
            # Its layer is that of the command line, which has been trained here.
            print(f"report: {pages.write(workdir, trust=True)}", flush=True)
    except Stopped:
        raise
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {first}"
        print(f"report: not written ({reason})", flush=True)


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,100}", text):
        quoted = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"--seeds must be whole numbers such as 0,1,2, got {quoted!r}")
    settings.check_seed("--seeds", int(text))
    return int(text)


def _workdir(seed: int, several: bool) -> Path:
    if WORKDIR.value:
        place = settings.place("--workdir", WORKDIR.value)
        return place / str(seed) if several else place
    file, _, argument = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    parts = [Path(file).stem, argument, str(seed)]
    name = "-".join(part for part in parts if part)
    name = re.sub(r"[^\w=,.-]", "_", name)
    try:
        return settings.place("--workdir", Path("runs", name))
    except ValueError as problem:
        raise ValueError(f"--workdir must be given: by default, {problem}") from None


def _print_seeds(outcomes: dict[int, dict]) -> None:
    """The tests of several seeds, and their median and range."""
    from train.losses import LOSSES

    kind = LOSSES[next(iter(outcomes.values()))["loss"]]
    tests = {"last": {seed: results["test"] for seed, results in outcomes.items()}}
    if all(results["best"] for results in outcomes.values()):
        tests["best"] = {s: results["best"]["test"] for s, results in outcomes.items()}
    if not all(tests["last"].values()):
        return
    print(f"\ntest {kind.title:<8}" + "".join(f"{name:>10}" for name in tests))
    columns = [[tests[name][s][kind.metric] for s in outcomes] for name in tests]
    for seed, *values in zip(outcomes, *columns, strict=True):
        print(f"seed {seed:<8}" + "".join(f"{value:>10.4f}" for value in values))
    for title, of in (("median", statistics.median), ("lowest", min), ("highest", max)):
        print(f"{title:<13}" + "".join(f"{of(column):>10.4f}" for column in columns))


def _parse(argv: list[str]) -> list[str]:
    """Positional arguments; raises a clear error for an invalid flag."""
    argv = _with_paths(argv)
    line = "\n".join(argv)
    path = re.search(r"^--?config[=\n](.*)", line, re.M)
    if path:
        _check_file(path[1].partition(":")[0])
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # else absl makes it INFO
        if path:
            given = config_flags.get_override_values(flags.FLAGS["config"])
            FIELDS.drop_unset(given)
            _check_config(path[1], CONFIG.value)
        return rest
    except (flags.Error, ValueError):
        raise
    except Exception as error:
        # Either the file itself fails, or a key that it does not have.
        keys = re.findall(r"^--?(?:no)?config\.([\w.]+)", line, re.M)
        if path is None or not isinstance(error, (AttributeError, KeyError)):
            keys = []
        if keys:
            with contextlib.suppress(AttributeError, KeyError):
                config = flags.FLAGS["config"].parser.parse(path[1])
                _check_config(path[1], config)
                for key in keys:
                    _check_key(config, key)
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"--config: {path[1] if path else ''} cannot be used "
            f"({type(error).__name__}: {lines[0]})"
        ) from error


def _with_paths(argv: list[str]) -> list[str]:
    """The arguments, with its path where --config names a file of `configs/` alone."""
    paths = {path.stem: path for path in _own_configs()}
    arguments = []
    for before, argument in zip(["", *argv], argv, strict=False):
        flag = re.match(r"--?config=", argument)
        if flag or before in ("--config", "-config"):
            start = flag.end() if flag else 0
            name, colon, rest = argument[start:].partition(":")
            argument = f"{argument[:start]}{paths.get(name, name)}{colon}{rest}"
        arguments.append(argument)
    return arguments


def _own_configs() -> list[Path]:
    files = sorted(Path(configs.__file__).parent.glob("*.py"))
    return [path for path in files if path.stem not in ("__init__", "common")]


def _check_file(file: str) -> None:
    place = settings.place("--config", file)
    if re.fullmatch(r"\w+", file) and not place.exists():
        names = ", ".join(path.stem for path in _own_configs())
        raise ValueError(
            f"--config must be a Python file's path or one of {names}, got {file!r}"
        )
    if not file or not place.exists():
        raise ValueError(f"--config: there is no file {file!r}")
    if place.suffix != ".py" or not place.is_file():
        raise ValueError(
            f"--config must be a Python file with get_config, such as "
            f"my/config.py:argument, got {file!r}"
        )


def _check_config(path: str, config) -> None:
    try:
        config.lock()  # any use of a file that could not be read raises
    except AttributeError:
        raise ValueError(
            f"--config: get_config of {path} must return a ConfigDict, got "
            f"{type(config).__name__}"
        ) from None


def _check_key(config, key: str) -> None:
    """Raises a `ValueError` that lists the names there are where `key` goes astray."""
    path = "config"
    for name in key.split("."):
        if not hasattr(config, "keys") or name not in config:
            valid = ", ".join(config.keys()) if hasattr(config, "keys") else ""
            raise ValueError(f"{path} has no {name!r}; it has {valid or 'no keys'}")
        config, path = config[name], f"{path}.{name}"


def _ours(error: Exception) -> bool:
    """Whether the message says it all: a mistake in what the user asked for."""
    if isinstance(error, flags.Error):
        return True
    faults = sys.modules.get("train.faults")
    if faults is not None and isinstance(error, faults.BatchError):
        return _ours(error.__cause__)
    # Looked up and not imported: an error of the flags comes before JAX has started.
    for module, name in (
        ("train.checkpoint", "CheckpointError"),
        ("train.data.workers", "WorkerError"),
        ("train.faults", "LostError"),
    ):
        if module in sys.modules and isinstance(
            error, getattr(sys.modules[module], name)
        ):
            return True
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        return True
    if not isinstance(error, (ValueError, FloatingPointError)):
        return False
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return Path(__file__).resolve().parents[1] in source.resolve().parents


def _unless_stopped(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """What `main` returns, or the code of a stop where a signal ended it and there was
    nothing to save."""
    with stop_signals() as stop:
        try:
            return main(argv)
        except Stopped as stopped:
            print(stopped, flush=True)
            return stop.code


def _end_at_once(message: str, code: int) -> None:
    """Says `message` and ends the process where an ordinary end would wait: for the
    threads of a save that was given up, which still wait for the files, or for the
    other processes of the run. Does nothing elsewhere."""
    checkpoint = sys.modules.get("train.checkpoint")
    hanging = checkpoint is not None and checkpoint.hanging()
    if not (hanging or hosts.several()):
        return
    for child in multiprocessing.active_children():
        child.kill()
    print(message, file=sys.stderr)
    hosts.leave(code)


def command(main: Callable[[list[str]], int]) -> None:
    """Runs `main` on the config flags; an error of the user is one line and exit
    code 2."""
    # Without their own frames, errors of JAX and Flax would look like ours.
    os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
    os.environ.setdefault("FLAX_FILTER_FRAMES", "0")
    try:
        with stop_signals(program=True):
            app.run(lambda argv: _unless_stopped(main, argv), flags_parser=_parse)
    except SystemExit as ending:
        if ending.code == 1 and any(map(HELP.fullmatch, sys.argv[1:])):
            sys.exit(0)  # who asked for help got it
        raise
    except Exception as error:
        if any(a.startswith("--debug") for a in sys.argv) or not _ours(error):
            _end_at_once(traceback.format_exc(), 1)
            raise
        # A config file's own error comes with its traceback, which --debug shows.
        last = (
            str(error).strip().splitlines()[-1] if "Traceback" in str(error) else error
        )
        message = f"error: {' '.join(str(last).split())}"
        _end_at_once(message, 2)
        print(message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(main)
