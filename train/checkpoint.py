"""Checkpoints that are known to be whole.

`<workdir>/checkpoints/<step>/` is written by orbax, in the background, under another
name and renamed when complete. It is then read back: all arrays must be there, and one
of every file is read. Orbax does not notice bytes that change later, so then
`digest.json` (see `train.digest`) is added, itself written aside and renamed. A
step without a digest is a save that was cut off; that, and one whose files do not match
their digest or whose state is of another step, is never used.
"""

import asyncio.log
import contextlib
import gc
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from train import digest, processes, stored
from train.files import disk_full
from train.state import TrainState, named_leaves

FOLDER = "checkpoints"
UNFINISHED = ".orbax-checkpoint-tmp*"
STATE = "state"

# Orbax looks for files by a pattern that begins with the path, tensorstore takes "\\"
# for "/", and both take "gs:/" for a place in the cloud. Such a path is handed to them
# as a link whose own path has none of that.
PLAIN = re.compile(r"[\w/.,=+@ -]*")
CLOUDS = ("gs", "s3", "az", "hf", "gcs")

T = TypeVar("T")

_abandoned: list[threading.Thread] = []  # of saves that took too long


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is for the user."""


def steps(workdir: str | Path) -> list[int]:
    """The steps that have a folder, good or not, oldest first.

    Raises:
        CheckpointError: the folder of checkpoints is none, or cannot be read.
    """
    folder = Path(workdir) / FOLDER
    try:
        with os.scandir(folder) as entries:
            # As a step is written, and no other digits or leading zeros.
            names = [e.name for e in entries if re.fullmatch("0|[1-9][0-9]*", e.name)]
            return sorted(int(n) for n in names if len(n) < 19 and _is_dir(folder / n))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None


def hanging() -> bool:
    """Whether a save that was given up still waits for its files: the threads that do,
    orbax's among them, then keep the interpreter from ending."""
    return any(thread.is_alive() for thread in _abandoned)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, a file and a reason; None if it is whole.

    Whole: every file is the one that was saved, and the state, which has all its
    arrays, is of the step that the folder's name says.
    """
    try:
        return digest.altered(folder) or _misplaced(folder)
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror}"


def _misplaced(folder: Path) -> str | None:
    """What is wrong with the arrays, or the step if that is not the folder's name."""
    try:
        with literal(folder) as path:
            arrays = stored.contents(path / STATE)
            if "step" not in arrays or arrays["step"].shape:
                return "its state has no step"
            step = int(stored.read(path / STATE, "step"))
    except ValueError as error:
        return f"{STATE}: {error}"
    if str(step) != folder.name:
        return f"it holds step {step}: the folder was renamed"
    return None


class _Unusable(Exception):
    """Why a checkpoint is passed over."""


def _newest(workdir: str | Path, use: Callable[[int], T]) -> T | None:
    """What `use` makes of the newest step that it does not call `_Unusable`; None where
    no save was ever completed. Which are whole is what process 0 finds: file systems
    show the processes of a run one thing at different times.

    Raises:
        CheckpointError: there are complete checkpoints, and all are unusable.
    """
    problems, damaged = [], False
    for step in reversed(processes.from_the_first(steps(workdir))):
        folder, result = _folder(workdir, step), None
        reason = _damage_found(folder)
        if reason is None:
            try:
                result = use(step)
            except _Unusable as error:
                reason = str(error)
            # All use it, or none does.
            reason = next(filter(None, processes.of_all(reason)), None)
        if reason is None:
            return result
        problems.append(f"{step}: {reason}")
        damaged |= not processes.from_the_first(digest.missing(folder))
        logging.warning("checkpoint %d is not used: %s", step, reason)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {workdir} can be used ({'; '.join(problems)}); to start "
            f"afresh, remove {Path(workdir) / FOLDER} or give another --workdir"
        )
    return None


def _damage_found(folder: Path) -> str | None:
    """What process 0 finds `damage` to be: it alone reads all files."""
    return processes.from_the_first(
        damage(folder) if jax.process_index() == 0 else None
    )


def newest_good(workdir: str | Path) -> int | None:
    """The newest step without damage; None where no save was ever completed.

    Raises:
        CheckpointError: there are complete checkpoints, and all are damaged.
    """
    return _newest(workdir, lambda step: step)


def last_good(workdir: str | Path) -> str:
    """The newest good step, in words for a message about something else."""
    for step in reversed(steps(workdir)):
        if damage(_folder(workdir, step)) is None:
            return f"step {step}"
    return "none"


def restore_params(
    workdir: str | Path, step: int | None = None
) -> tuple[dict[str, Any], int]:
    """The variables of a run, as NumPy arrays, whatever devices it had.

    Args:
        workdir: folder of the run.
        step: number of the checkpoint; None takes the newest good one.

    Returns:
        {"params" [, "batch_stats", "buffers"]}, with the averaged weights as "params"
        where the run has them, and the step.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
    """
    if step is None:
        result = _newest(workdir, lambda step: (_read_params(workdir, step), step))
        if result is None:
            raise CheckpointError(f"there is no checkpoint in {workdir}")
        return result
    there = processes.from_the_first(steps(workdir))
    if step not in there:
        raise CheckpointError(
            f"no checkpoint of step {step} in {workdir}, which has {there}"
        )
    if reason := _damage_found(_folder(workdir, step)):
        raise CheckpointError(f"checkpoint {step} in {workdir} is damaged: {reason}")
    try:
        return _read_params(workdir, step), step
    except _Unusable as error:
        raise CheckpointError(f"checkpoint {step} in {workdir}: {error}") from error


def _read_params(workdir: str | Path, step: int) -> dict[str, Any]:
    """The variables of a checkpoint without damage."""
    with _readable(), literal(_folder(workdir, step)) as path:
        folder = path / STATE
        handler = ocp.PyTreeCheckpointHandler()
        saved = handler.metadata(epath.Path(folder)).tree
        tree = {k: saved[k] for k in ("params", "batch_stats", "buffers", "ema")}
        if tree["ema"]:
            del tree["params"]
        arrays = stored.contents(folder)
        stored.check_size({k: v for k, v in arrays.items() if k.split(".")[0] in tree})
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
        )
        variables = handler.restore(
            epath.Path(folder),
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=as_numpy, partial_restore=True
            ),
        )
    params = variables.pop("ema") or variables["params"]
    variables["params"] = params
    return {name: value for name, value in variables.items() if value}


def init_from(workdir: str | Path, state: TrainState) -> TrainState:
    """`state` with the newest variables of another run, whatever of them fits.

    A parameter that the other run lacks, or has in another shape (the head for another
    task), keeps its first value and is named.

    Raises:
        ValueError: nothing fits.
        CheckpointError: no checkpoint there can be used.
    """
    variables, step = restore_params(workdir)
    available = dict(named_leaves(variables))
    unmatched = []

    def take(name, leaf):
        if name not in available or available[name].shape != leaf.shape:
            unmatched.append(name)
            return leaf
        return jax.device_put(available[name].astype(leaf.dtype), leaf.sharding)

    current = {"params": state.params, **state.collections()}
    leaves = [take(name, leaf) for name, leaf in named_leaves(current)]
    merged = jax.tree.unflatten(jax.tree.structure(current), leaves)
    if len(unmatched) == len(leaves):
        raise ValueError(f"train.init_from: no parameter of {workdir} fits this model")
    print(f"initialised from step {step} of {workdir}")
    if unmatched:
        print(f"not initialised from there: {', '.join(unmatched)}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, merged["params"])
    return state.replace(**merged, ema=ema)


class Checkpoints:
    """Writes and restores the checkpoints of one run.

    A save copies the state to the host and returns; a thread waits for the files, adds
    the digest and only then removes what is no longer kept. One save at a time.

    Args:
        workdir: folder of the run.
        keep: how many of the newest steps to keep, at least 1.
        check: raises an error once nothing more may be written there.
        timeout: seconds that a save may take; 0 for any time. A save that takes longer
            is given up: `poll` and `wait` raise, and no other may follow.

    Raises:
        ValueError: keep below 1, or a negative timeout.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int,
        check: Callable[[], None] = lambda: None,
        timeout: float = 0.0,
    ):
        if keep < 1:
            raise ValueError(f"train.keep must be 1 or more, got {keep}")
        if timeout < 0:
            raise ValueError(f"train.save_timeout must be 0 or more, got {timeout}")
        self._workdir = Path(workdir).absolute()
        self._keep = keep
        self._check = check
        self._timeout = timeout
        self._began = 0.0  # the save in the background, by the monotonic clock
        self._given_up: CheckpointError | None = None  # once a save was
        self._good: int | None = None  # the last step that is known to be whole
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving: tuple[int, int] | None = None  # step, bytes
        self._paths = contextlib.ExitStack()  # of the save in the background

    def __enter__(self) -> "Checkpoints":
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_said_once())
        return self

    def __exit__(self, kind, *_):
        failed = kind is not None
        with self._quiet:
            try:
                if self._given_up is None:
                    self.wait()
            except Exception as error:
                if not failed:
                    failed = True
                    raise
                logging.warning("%s", error)  # the error on its way out comes first
            finally:
                if self._given_up is None:  # else it would be waited for here
                    self._writer.close()
                    if failed and self._saving:
                        gc.collect()  # writes that were left end while this is quiet

    def save(
        self, state: TrainState, data: dict, metadata: dict, best: int | None = None
    ) -> None:
        """Starts to save `state`, the position of the data and what the loop remembers.

        Args:
            state, data, metadata: the arrays, and two JSON-able dicts; copies are
                taken before this returns.
            best: a step to keep however old it grows.

        Raises:
            CheckpointError: the disk is full, or a save takes longer than the timeout;
                now or in the save before this one.
        """
        self.wait()
        self._check()
        step, self._began = int(state.step), time.monotonic()
        self._saving = step, sum(x.nbytes for x in jax.tree.leaves(state))
        shapes = _shapes(state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(_copy(data)),
            metadata=ocp.args.JsonSave(_copy(metadata)),
        )
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            workdir = self._paths.enter_context(literal(self._workdir))
            self._writer.save(_folder(workdir, step), args=items)
        except Exception as error:
            self._fail(error)
        # What hangs must not keep the interpreter from ending.
        self._thread = threading.Thread(
            target=self._finish, args=(step, best, shapes), daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Raises the error of the save in the background, if it has failed already or
        takes longer than the timeout, or that nothing more may be saved."""
        self._check()
        late = self._thread is not None and self._left() == 0
        if late or self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete; raises the error it ended with, or a
        `CheckpointError` once it takes longer than the timeout."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.join(self._left())
            if thread.is_alive():
                self._give_up(thread)
        if self._given_up is not None:
            raise self._given_up
        if self._error is not None:
            error, self._error = self._error, None
            self._fail(error)

    def _left(self) -> float | None:
        """Seconds that the save in the background may still take; None for any time."""
        if not self._timeout:
            return None
        left = self._began + self._timeout - time.monotonic()
        return min(max(left, 0.0), threading.TIMEOUT_MAX)

    def _give_up(self, thread: threading.Thread) -> None:
        """Leaves the save to itself. Nothing of it is removed or looked at: where one
        thread waits for the files in vain, so would this one."""
        _abandoned.append(thread)
        step, _ = self._saving
        good = "none" if self._good is None else f"step {self._good}"
        self._given_up = CheckpointError(
            f"the checkpoint {_folder(self._workdir, step)} was not written within "
            f"{self._timeout:g} s, which is train.save_timeout; last good checkpoint: "
            f"{good}; once its file system answers, start the same command again"
        )

    def restore(self, target: TrainState) -> tuple[TrainState, dict, dict] | None:
        """The newest good checkpoint; None in a run that has none yet.

        Newer ones that are damaged are renamed to `damaged-<step>`, out of the way of
        those that are written next; what saves that were cut off left is removed.

        Args:
            target: shapes, dtypes and shardings to restore to, on any devices.

        Returns:
            state, data, metadata as they were saved.

        Raises:
            CheckpointError: there are complete checkpoints, and all are damaged.
        """
        newest = _newest(self._workdir, lambda step: (step, self._read(step, target)))
        if jax.process_index() == 0:
            self._tidy(newest and newest[0])
        self._good = newest and newest[0]
        return newest and newest[1]

    def _read(self, step: int, target: TrainState) -> tuple[TrainState, dict, dict]:
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            ),
            data=ocp.args.JsonRestore(),
            metadata=ocp.args.JsonRestore(),
        )
        with _readable(), literal(_folder(self._workdir, step)) as path:
            # Orbax cuts off and pads what has another shape.
            _compare(stored.contents(path / STATE), _shapes(target))
            restored = self._writer.restore(epath.Path(path), args=items)
        for key in ("data", "metadata"):
            if not isinstance(restored[key], dict):
                raise _Unusable(f"{key} must be an object, got {restored[key]!r:.60}")
        if restored.metadata.get("step", step) != step:
            raise _Unusable(f"it remembers step {restored.metadata['step']}")
        return restored.state, restored.data, restored.metadata

    def _tidy(self, newest: int | None) -> None:
        for leftover in (self._workdir / FOLDER).glob(f"*{UNFINISHED}"):
            _remove(leftover)
        for step in steps(self._workdir):
            folder = _folder(self._workdir, step)
            if digest.missing(folder):
                logging.warning("checkpoint %d is removed: its save was cut off", step)
                _remove(folder)
            elif step > newest:
                backup = self._workdir / FOLDER / f"damaged-{step}"
                _remove(backup)
                folder.rename(backup)

    def _finish(self, step: int, best: int | None, shapes: dict) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                _read_back(_folder(self._workdir, step), shapes)
                # The workdir of a save that was given up may be another run's by now.
                if self._given_up is None:
                    digest.write(_folder(self._workdir, step))
            if self._given_up is not None:
                return
            self._good = step
            if jax.process_index() == 0:
                remaining = {*steps(self._workdir)[-self._keep :], best}
                for old in set(steps(self._workdir)) - remaining:
                    _remove(_folder(self._workdir, old))
        except BaseException as error:  # raised again in the main thread
            self._error = error
        finally:
            self._paths.close()

    def _fail(self, error: BaseException) -> None:
        self._paths.close()
        step, size = self._saving
        folder = _folder(self._workdir, step)
        for half in (*folder.parent.glob(f"{step}{UNFINISHED}"), folder):
            if digest.missing(half):
                _remove(half)
        if isinstance(error, _Unusable):
            raise CheckpointError(
                f"the checkpoint of step {step} in {folder.parent} was written, but "
                f"cannot be read back: {error}; last good checkpoint: "
                f"{last_good(self._workdir)}"
            ) from error
        if not disk_full(error):
            raise error
        free = shutil.disk_usage(self._workdir).free
        raise CheckpointError(
            f"the disk is full: the checkpoint of step {step} needs up to "
            f"{size / 1e6:.1f} MB in {folder.parent}, where {free / 1e6:.1f} MB are "
            f"free; last good checkpoint: {last_good(self._workdir)}; make room and "
            "start the same command again"
        ) from error


def _folder(workdir: str | Path, step: int) -> Path:
    return Path(workdir).absolute() / FOLDER / str(step)


@contextlib.contextmanager
def literal(path: Path) -> Iterator[Path]:
    """Yields `path`, or for the time being a link to it, so that orbax and tensorstore
    take it literally."""
    path = Path(path).absolute()
    if _is_plain(path):
        yield path
        return
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    place = next((p for p in places if _is_plain(p.absolute()) and p.is_dir()), None)
    if place is None:
        raise CheckpointError(
            f"workdir must be a path of letters, digits and ., =+@-_ where TMPDIR is "
            f"none either, got {path}"
        )
    with tempfile.TemporaryDirectory(prefix="ssmax-", dir=place.absolute()) as folder:
        link = Path(folder, path.name if _is_plain(Path(path.name)) else "run")
        link.symlink_to(path, target_is_directory=True)
        yield link


def _is_plain(path: Path) -> bool:
    parts = path.parts
    cloud = len(parts) > 1 and parts[0] == "/" and parts[1] in CLOUDS
    return bool(PLAIN.fullmatch(str(path))) and ".." not in parts and not cloud


@contextlib.contextmanager
def _readable():
    """Turns what orbax raises about files, of many kinds, into `_Unusable`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        first, *_ = str(error).strip().splitlines() or [""]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise _Unusable(f"it cannot be read: {kind}{first[:200]}") from error
    except RecursionError as error:
        raise _Unusable("it cannot be read: nested too deeply") from error


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a state by the names under which they are saved."""
    return {
        ".".join(jax.tree_util.keystr((key,), simple=True) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _compare(arrays: dict[str, stored.Stored], shapes: dict) -> None:
    """Raises a `ValueError` where arrays are not those of `shapes`."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        if arrays[name].shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(arrays[name].shape)}"
            )


def _read_back(folder: Path, shapes: dict) -> None:
    """Raises `_Unusable` unless a save has all arrays and one of each file is read."""
    with _readable(), literal(folder) as path:
        arrays = stored.contents(path / STATE)
        _compare(arrays, shapes)
        stored.read_back(path / STATE, arrays)
        for item in ("data", "metadata"):
            json.loads((path / item / "metadata").read_text())


def _is_dir(path: Path) -> bool:
    """Also where nothing in it can be read."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _copy(tree: dict) -> dict:
    """orbax writes JSON in the background, when the caller may have changed it."""
    return json.loads(json.dumps(tree))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _said_once():
    """What orbax and asyncio print of an error that is raised as well is not printed:
    the traceback that orbax logs, those of other writes to the full disk, and those of
    writes that end after the first that failed has ended the save, which find its event
    loop closed."""
    orbax = Path(ocp.__file__).parent

    def not_from_orbax(record) -> bool:
        from_orbax = orbax in Path(record.pathname).parents
        return not (from_orbax and record.levelname == "ERROR")

    def not_full_disk(record) -> bool:
        return not (record.exc_info and disk_full(record.exc_info[1]))

    hook = sys.unraisablehook

    def unless_loop_closed(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
            hook(unraisable)

    loggers = {
        logging.get_absl_logger(): not_from_orbax,
        asyncio.log.logger: not_full_disk,
    }
    for logger, condition in loggers.items():
        logger.addFilter(condition)
    sys.unraisablehook = unless_loop_closed
    try:
        yield
    finally:
        for logger, condition in loggers.items():
            logger.removeFilter(condition)
        if sys.unraisablehook is unless_loop_closed:
            sys.unraisablehook = hook
