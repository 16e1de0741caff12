"""One run at a time in a workdir.

`<workdir>/run.lock` says who runs there. It is made by a hard link (or, where there are
none, by an exclusive create), which works on file systems that lock nothing, and its
holder touches it every few seconds. It is dead when its process is, where that can be
seen from here, else when it was not touched for STALE seconds, both times by the clock
of the file system.

A dead lock is succeeded: whoever creates `run.lock.<id of the dead one>`, which one
alone can, has the lock as long as the dead one is still in its place, and then renames
its own over it. That id is used once, so that a slower taker which saw the dead lock
too finds either that the succession is taken or that the lock is another one now.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from train import files

NAME = "run.lock"
BEAT = 10.0  # seconds between two touches
STALE = 60.0  # seconds after which a lock that nobody touches is dead
PARTING = 5.0  # seconds that a touch may take at the end
WRITING = 2.0  # seconds in which a lock that was created is also written
HIDDEN = "hidden"  # when a process began that runs, but of which no more is shown


class Lock:
    """What tells a running holder whether the workdir is still its own.

    Attributes:
        id: of this lock, None of none.
        lost: who has it instead; None as long as all is well.
        left: whether it stays behind at the end, as that of a process that was killed
            does: others of the run may still write, or the file system hangs.
    """

    def __init__(self):
        self.id: str | None = None
        self.lost: str | None = None
        self.left = False

    def check(self) -> None:
        """Raises a `ValueError` if another process has taken the lock."""
        if self.lost is not None:
            raise ValueError(self.lost)


@contextlib.contextmanager
def held(workdir: str | Path, patience: float = 0.0) -> Iterator[Lock]:
    """Holds `workdir`, which is made if need be.

    What was made here is removed again if nothing was put into it.

    Args:
        workdir: folder of the run.
        patience: seconds to wait for a sign of life from a holder that cannot be seen
            from here, such as one that was lost with its host. STALE show that it is
            dead.

    Raises:
        ValueError: another run has it, or `workdir` cannot be written.
        OSError: the disk is full.
    """
    workdir, lock, folders = Path(workdir).absolute(), Lock(), []
    with contextlib.ExitStack() as leaving:
        leaving.callback(_remove_empty, folders)
        _make(workdir, folders)
        record = _acquire(workdir / NAME, patience)
        lock.id = record["id"]
        leaving.callback(_release, workdir / NAME, record, lock)
        leaving.enter_context(_beating(workdir / NAME, record, lock))
        yield lock


def holder_id(workdir: str | Path) -> str | None:
    """The id of the lock that is seen in `workdir`; None where there is none."""
    chain, holder = _chain(Path(workdir) / NAME)
    return holder.get("id") if chain and holder else None


def _make(workdir: Path, folders: list[Path]) -> None:
    """Makes the folder and those above it, which are added to `folders`."""
    try:
        for path in (*reversed(workdir.parents), workdir):
            if not path.is_dir():
                try:
                    path.mkdir()
                    folders.append(path)
                except FileExistsError:
                    if not path.is_dir():  # else another run has made it just now
                        raise ValueError(
                            f"workdir must be a folder, got the file {path}"
                        ) from None
    except OSError as error:
        _refuse(workdir, error)


def _refuse(workdir: Path, error: OSError) -> None:
    if files.disk_full(error):
        raise error
    raise ValueError(
        f"workdir must be a folder that can be written, got {workdir}: {error.strerror}"
    ) from error


def _acquire(path: Path, patience: float) -> dict:
    """Puts an own lock at `path`; what it says."""
    deadline, silent = time.monotonic() + patience, None
    record = {
        "id": secrets.token_hex(8),
        "host": socket.gethostname(),
        "place": _place(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    draft = path.with_name(f"{NAME}.{record['id']}.tmp")
    try:
        draft.write_text(json.dumps(record))
        while not _create(draft, path):
            chain, holder = _chain(path)
            if holder is None:
                continue  # it went away just now
            if holder.get("id") == record["id"]:
                break  # a network repeated the link that had succeeded
            if not _dead(holder, chain[-1], draft):
                sign = _sign_of_life(holder, chain[-1])
                if sign is None or time.monotonic() > deadline:
                    raise ValueError(_in_use(path.parent, holder))
                if silent is None:
                    print(f"{path}: waiting whether {_who(holder).strip()} is alive")
                elif sign != silent:
                    raise ValueError(_in_use(path.parent, holder))
                silent = sign
                time.sleep(0.2)
                continue
            if _succeed(draft, record, chain, holder):
                logging.warning(
                    "%s is taken over: %s has ended", path, _who(holder).strip()
                )
                break
            time.sleep(0.01)
        _sweep(path, draft)
    except OSError as error:
        _refuse(path.parent, error)
    finally:
        files.remove(draft)
    return record


def _sweep(path: Path, draft: Path) -> None:
    """Removes what takers that were killed have left beside the lock."""
    for leftover in path.parent.glob(f"{NAME}.*"):
        with contextlib.suppress(OSError):
            if draft.stat().st_mtime - leftover.stat().st_mtime > STALE:
                leftover.unlink()


def _create(draft: Path, path: Path) -> bool:
    """Whether `path`, which was not there, now has the content of `draft`."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(file, "wb") as stream:
            stream.write(draft.read_bytes())
        return True


def _chain(path: Path) -> tuple[list[Path], dict | None]:
    """The lock and those that succeed to it, and what the last one says: the holder's
    word, {} if it cannot be read; None where there is no lock."""
    chain, holder = [], None
    while (record := _read(path)) is not None:
        chain.append(path)
        holder = record
        if not record or len(chain) > 100:
            break
        path = chain[0].with_name(f"{NAME}.{record['id']}")
    return chain, holder


def _read(path: Path) -> dict | None:
    """What a lock says; None where there is none, {} where it is not to be read."""
    deadline = time.monotonic() + WRITING
    while True:
        try:
            record = json.loads(path.read_text())
            valid = isinstance(record, dict) and isinstance(record.get("id"), str)
            # An id becomes part of a file's name.
            if valid and record["id"].isalnum():
                return record
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            raise ValueError(
                f"{path} must be a file, got a folder: move it away"
            ) from None
        except (ValueError, RecursionError, OSError):
            pass
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.05)


def _sign_of_life(holder: dict, path: Path) -> tuple | None:
    """What changes when a holder touches its lock; None of one that is seen to live, or
    that cannot be read, which is not waited for."""
    if not holder or _seen(holder):
        return None
    try:
        return holder["id"], path.stat().st_mtime
    except FileNotFoundError:  # it went away just now
        return holder["id"], 0.0


def _seen(holder: dict) -> bool | None:
    """Whether the process of a holder lives; None where that is not seen from here."""
    process, started = holder.get("process"), holder.get("started")
    if holder.get("place") == _place() and type(process) is int and started:
        current = _started(process)
        if current != HIDDEN:
            return current == started
    return None


def _dead(holder: dict, path: Path, draft: Path) -> bool:
    """Whether a holder has ended; `draft` was just written, by the same clock."""
    if (alive := _seen(holder)) is not None:
        return not alive
    try:
        draft.touch()
        return draft.stat().st_mtime - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return False  # it went away just now


def _succeed(draft: Path, record: dict, chain: list[Path], holder: dict) -> bool:
    """Whether the own lock took the place of a chain of dead ones."""
    root = chain[0]
    heir = root.with_name(f"{NAME}.{holder.get('id', 'unreadable')}")
    if not holder:  # such as an empty file: nobody can succeed it by name
        heir = root.with_name(f"{NAME}.unreadable")
    if not _create(draft, heir):
        if not holder:
            _expire(heir, draft)
        return False
    current, last = _chain(root)
    expected = [*chain, heir] if holder else chain
    if (
        current != expected
        or (holder and last["id"] != record["id"])
        or bool(last) != bool(holder)
    ):
        files.remove(heir)
        return False
    try:
        heir.replace(root)
    except FileNotFoundError:  # swept away: this process slept for very long
        return False
    for dead in chain[1:]:
        files.remove(dead)
    return True


def _expire(heir: Path, draft: Path) -> None:
    """Removes the successor of an unreadable lock if it was left behind."""
    holder = _read(heir)
    if holder is not None and _dead(holder, heir, draft):
        files.remove(heir)


@contextlib.contextmanager
def _beating(path: Path, record: dict, lock: Lock):
    """Touches the lock from a thread until this is left."""
    finished = threading.Event()

    def beat():
        while not finished.wait(BEAT):
            with contextlib.suppress(OSError):
                current = _read(path)
                if finished.is_set():
                    return
                if current is None:  # removed by hand
                    _rewrite(path, record)
                elif current.get("id") == record["id"]:
                    os.utime(path)
                else:
                    lock.lost = (
                        f"{path.parent} is no longer this run's, which did not touch "
                        f"its {NAME} for more than {STALE:.0f} s: {_who(current)} "
                        "has it"
                    )
                    return

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join(PARTING)
        if thread.is_alive():  # it waits for the file system
            lock.left = True


def _rewrite(path: Path, record: dict) -> None:
    draft = path.with_name(f"{NAME}.{record['id']}.tmp")
    try:
        draft.write_text(json.dumps(record))
        _create(draft, path)
    finally:
        files.remove(draft)


def _release(path: Path, record: dict, lock: Lock) -> None:
    if lock.left:
        return
    current = _read(path)
    if current is not None and current.get("id") == record["id"]:
        files.remove(path)


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with contextlib.suppress(OSError):
            path.rmdir()


def _in_use(workdir: Path, holder: dict) -> str:
    return (
        f"{workdir} is in use by another run: {_who(holder)}; wait for its end, or "
        "give another --workdir"
    )


def _who(holder: dict) -> str:
    if not holder:
        return f"its {NAME} cannot be read"
    return (
        f"process {holder.get('process')} on host {holder.get('host')} since "
        f"{holder.get('since')}"
    )


def _place() -> str:
    """Names where the number of a process says which one it is: a host since its last
    start, and a container on it."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = os.path.islink(path)
            parts.append(os.readlink(path) if link else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _started(process: int) -> str | None:
    """When a process began, in the words of the system; None if it does not run."""
    try:
        # After the command's name, which may have spaces and brackets of its own.
        rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if rest[0] in "ZX" else rest[19]
    except FileNotFoundError:
        if not Path("/proc/self/stat").exists():
            return _started_by_ps(process)
    except (OSError, IndexError):
        pass
    return HIDDEN if _runs(process) else None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _started_by_ps(process: int) -> str | None:
    """The same where there is no /proc."""
    command = ["ps", "-o", "stat=,lstart=", "-p", str(process)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, _, began = result.stdout.strip().partition(" ")
    return began.strip() if began and not state.startswith("Z") else None
