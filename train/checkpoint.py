"""Checkpoints that are known to be whole.

`<workdir>/checkpoints/<step>/` is written by orbax, in the background, under another
name and renamed when complete. Orbax does not notice bytes that change later, so then
`digest.json` (the sha256 of every file) is added, itself written aside and renamed. A
step without a digest is a save that was cut off; that, and one whose files do not match
their digest, is never used.
"""

import asyncio.log
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from train.state import TrainState

FOLDER = "checkpoints"
DIGEST = "digest.json"
UNFINISHED = ".orbax-checkpoint-tmp*"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is for the user."""


def steps(workdir: str | Path) -> list[int]:
    """The steps that have a folder, good or not, oldest first."""
    folders = (Path(workdir) / FOLDER).glob("*")
    return sorted(int(f.name) for f in folders if f.name.isdigit() and f.is_dir())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, a file and a reason; None if it is whole."""
    try:
        digest = json.loads((folder / DIGEST).read_text())
        files = {name: (want["bytes"], want["sha256"]) for name, want in digest.items()}
    except FileNotFoundError:
        empty = folder.is_dir() and not any(folder.iterdir())
        return "the folder is empty" if empty else f"{DIGEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"{DIGEST} cannot be read ({type(error).__name__})"
    if not files:
        return f"{DIGEST} names no file"
    for name, (size, sha256) in files.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _sha256(folder / name) != sha256:
                return f"{name} has altered bytes"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def newest_good(workdir: str | Path) -> int | None:
    """The newest step without damage; None where no save was ever completed.

    Raises:
        CheckpointError: there are complete checkpoints, and all are damaged.
    """
    tried, damaged = [], False
    for step in reversed(steps(workdir)):
        reason = damage(_folder(workdir, step))
        if reason is None:
            return step
        tried.append(f"{step}: {reason}")
        damaged |= not _unfinished(_folder(workdir, step))
        logging.warning("checkpoint %d is not used: %s", step, reason)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {workdir} can be used ({'; '.join(tried)}); to start "
            f"afresh, remove {Path(workdir) / FOLDER} or give another --workdir"
        )
    return None


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
        workdir: of the run.
        step: of the checkpoint; None takes the newest good one.

    Returns:
        {"params" [, "batch_stats", "buffers"]}, with the averaged weights as "params"
        where the run has them, and the step.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
    """
    if step is None:
        step = newest_good(workdir)
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {workdir}")
    elif step not in steps(workdir):
        raise CheckpointError(
            f"no checkpoint of step {step} in {workdir}, which has {steps(workdir)}"
        )
    elif reason := damage(_folder(workdir, step)):
        raise CheckpointError(f"checkpoint {step} in {workdir} is damaged: {reason}")
    folder = epath.Path(_folder(workdir, step)) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(folder).tree
    wanted = {k: saved[k] for k in ("params", "batch_stats", "buffers", "ema")}
    if wanted["ema"]:
        del wanted["params"]
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    found = handler.restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item=wanted, restore_args=as_numpy, partial_restore=True
        ),
    )
    params = found.pop("ema") or found["params"]
    found["params"] = params
    return {name: value for name, value in found.items() if value}, step


def init_from(workdir: str | Path, state: TrainState) -> TrainState:
    """`state` with the newest variables of another run, whatever of them fits.

    A parameter that the other run lacks, or has in another shape (the head for another
    task), keeps its first value and is named.

    Raises:
        ValueError: nothing fits.
        CheckpointError: no checkpoint there can be used.
    """
    variables, step = restore_params(workdir)
    found = dict(named_leaves(variables))
    fresh = []

    def take(name, leaf):
        if name not in found or found[name].shape != leaf.shape:
            fresh.append(name)
            return leaf
        return jax.device_put(found[name].astype(leaf.dtype), leaf.sharding)

    own = {"params": state.params, **state.collections()}
    leaves = [take(name, leaf) for name, leaf in named_leaves(own)]
    taken = jax.tree.unflatten(jax.tree.structure(own), leaves)
    if len(fresh) == len(leaves):
        raise ValueError(f"train.init_from: no parameter of {workdir} fits this model")
    print(f"initialised from step {step} of {workdir}")
    if fresh:
        print(f"not initialised from there: {', '.join(fresh)}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, taken["params"])
    return state.replace(**taken, ema=ema)


class Checkpoints:
    """Writes and restores the checkpoints of one run.

    A save copies the state to the host and returns; a thread waits for the files, adds
    the digest and only then removes what is no longer kept. One save at a time.

    Args:
        workdir: of the run.
        keep: how many of the newest steps to keep, at least 1.
    """

    def __init__(self, workdir: str | Path, keep: int):
        if keep < 1:
            raise ValueError(f"train.keep must be 1 or more, got {keep}")
        self._workdir = Path(workdir).absolute()
        self._keep = keep
        logging.get_absl_logger().addFilter(_not_orbax_error)
        asyncio.log.logger.addFilter(_not_full_disk)
        sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving: tuple[int, int] | None = None  # step, bytes

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_):
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logging.warning("%s", error)  # the error on its way out comes first
        finally:
            self._writer.close()

    def save(
        self, state: TrainState, data: dict, metadata: dict, best: int | None = None
    ) -> None:
        """Starts to save `state`, the position of the data and what the loop remembers.

        Args:
            state, data, metadata: the arrays, and two JSON-able dicts; copies are
                taken before this returns.
            best: a step to keep however old it grows.

        Raises:
            CheckpointError: the disk is full; now or in the save before this one.
        """
        self.wait()
        step = int(state.step)
        self._saving = step, sum(x.nbytes for x in jax.tree.leaves(state))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(_copy(data)),
            metadata=ocp.args.JsonSave(_copy(metadata)),
        )
        try:
            self._writer.save(_folder(self._workdir, step), args=items)
        except Exception as error:
            self._fail(error)
        self._thread = threading.Thread(target=self._finish, args=(step, best))
        self._thread.start()

    def poll(self) -> None:
        """Raises the error of the save in the background, if it has failed already."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete; raises the error it ended with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self._fail(error)

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
        step = newest_good(self._workdir)
        if jax.process_index() == 0:
            self._tidy(step)
        if step is None:
            return None
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            ),
            data=ocp.args.JsonRestore(),
            metadata=ocp.args.JsonRestore(),
        )
        found = self._writer.restore(_folder(self._workdir, step), args=items)
        return found.state, found.data, found.metadata

    def _tidy(self, newest: int | None) -> None:
        for leftover in (self._workdir / FOLDER).glob(f"*{UNFINISHED}"):
            _remove(leftover)
        for step in steps(self._workdir):
            folder = _folder(self._workdir, step)
            if _unfinished(folder):
                logging.warning("checkpoint %d is removed: its save was cut off", step)
                _remove(folder)
            elif step > newest:
                aside = self._workdir / FOLDER / f"damaged-{step}"
                _remove(aside)
                folder.rename(aside)

    def _finish(self, step: int, best: int | None) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                _write_digest(_folder(self._workdir, step))
                kept = {*steps(self._workdir)[-self._keep :], best}
                for old in set(steps(self._workdir)) - kept:
                    _remove(_folder(self._workdir, old))
        except BaseException as error:  # raised again in the main thread
            self._error = error

    def _fail(self, error: BaseException) -> None:
        step, size = self._saving
        folder = _folder(self._workdir, step)
        for half in (*folder.parent.glob(f"{step}{UNFINISHED}"), folder):
            if _unfinished(half):
                _remove(half)
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


def _unfinished(folder: Path) -> bool:
    """Whether the digest, which is written last, is not there."""
    return not (folder / DIGEST).exists()


def _copy(tree: dict) -> dict:
    """orbax writes JSON in the background, when the caller may have changed it."""
    return json.loads(json.dumps(tree))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def named_leaves(tree) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, the path as "params/encoder/kernel"."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_digest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }
    write_atomically(folder / DIGEST, json.dumps(digest, indent=1))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is there whole or not at all, even if the machine stops."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _not_orbax_error(record) -> bool:
    """False for the traceback that orbax logs of an error which it raises as well."""
    from_orbax = Path(ocp.__file__).parent in Path(record.pathname).parents
    return not (from_orbax and record.levelname == "ERROR")


def _not_full_disk(record) -> bool:
    """False for what asyncio logs of the writes that fail beside the one whose error is
    raised."""
    return not (record.exc_info and disk_full(record.exc_info[1]))


def _without_closed_loops(hook):
    """`hook` without the tracebacks of writes that end after the first that failed has
    ended the save: they find its event loop closed. The failure itself is raised."""
    if getattr(hook, "func", None) is _unless_loop_closed:
        return hook
    return functools.partial(_unless_loop_closed, hook)


def _unless_loop_closed(hook, unraisable):
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
        hook(unraisable)


def disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, says that there is no room."""
    while error is not None:
        full = (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and error.errno in full:
            return True
        if any(os.strerror(number) in str(error) for number in full):
            return True
        error = error.__cause__ or error.__context__
    return False
