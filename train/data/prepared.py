"""Data that are computed or converted once and then read from disk.

A prepared folder holds array_record files and a manifest with the settings they were
made from and a digest of each. It is filled under another name and renamed when it is
complete, so that what was interrupted never looks finished. The files that were whole
by then stay, and the next attempt goes on from them.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import IO, NamedTuple

import grain
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from train import files
from train.data.sources import SPLITS, Example

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"
LOCK = ".lock"
FEW = 1_000  # records


def prepare(
    folder: Path, settings: Mapping, write: Callable[[Path], None], what: str
) -> None:
    """Makes `folder` hold what `write(folder)` writes for `settings`.

    Nothing happens where it holds that already. A folder that is incomplete, whose
    files were altered or that other settings made is made anew. Several processes may
    ask for this at once: one does it, the others wait for it.

    Args:
        folder: to be filled, its parents included.
        settings: everything that the files depend on, as JSON knows it.
        write: fills a folder, which has what `write_records` finished there in an
            attempt with these settings that was interrupted, by a signal or a disk that
            was full. Any other error of it passes through and leaves nothing.
        what: the data's name, for messages.

    Raises:
        ValueError: this system has no array_record, or a folder cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    fault = _fault(folder, settings)
    if fault is None:
        return
    if importlib.util.find_spec("array_record") is None:
        raise ValueError(
            f"{what} is kept in array_record files, and the package array_record is "
            "missing here: pip install array_record; it is built for Linux only"
        )
    if folder.exists():
        print(f"{folder}: {fault}; {what} is prepared again", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.folder must be a folder that can be written, got {folder.parent} "
            f"({error.strerror})"
        ) from error
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    filled = folder.with_name(f".{folder.name}-{name[:12]}")
    with _alone(filled, what):
        if _fault(folder, settings) is None:  # another process was faster
            _discard(filled)
            return
        try:
            write(filled)
            _complete(filled, settings)
            _put(filled, folder, settings)
        except OSError:
            # Where files cannot be locked, another process may still be faster.
            if _fault(folder, settings) is not None:
                raise
            _discard(filled)
        except Exception:  # not what interrupts: that leaves what is whole
            _discard(filled)
            raise


@contextlib.contextmanager
def _alone(filled: Path, what: str) -> Iterator[None]:
    """While no other process fills this folder, which is made where it is not there."""
    while (lock := _lock(filled, what)) is None:
        pass
    with lock:
        yield


def _lock(filled: Path, what: str) -> IO | None:
    """The lock on a folder, once nobody else has it; None where the folder was renamed
    or removed meanwhile, its lock with it.

    It ends with the process that holds it, by whatever signal. A file system without
    locks has none.
    """
    filled.mkdir(exist_ok=True)
    try:
        file = (filled / LOCK).open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{what}: another process prepares it, which is waited for", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(filled / LOCK)):
            return file
    file.close()
    return None


def _discard(filled: Path) -> None:
    """Removes a folder and, at once, its name: who comes meanwhile finds no part of
    it."""
    with (
        tempfile.TemporaryDirectory(dir=filled.parent, prefix=filled.name) as temporary,
        contextlib.suppress(OSError),
    ):
        os.rename(filled, Path(temporary) / "discarded")


def _complete(filled: Path, settings: Mapping) -> None:
    """Writes the manifest of a folder, and removes what an interrupted attempt left
    unfinished."""
    for path in filled.glob(f"{UNFINISHED}*"):
        path.unlink()
    paths = sorted(x for x in filled.iterdir() if x.name not in (MANIFEST, LOCK))
    digests = {path.name: files.sha256(path) for path in paths}
    manifest = {"settings": settings, "files": digests}
    (filled / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _put(filled: Path, folder: Path, settings: Mapping) -> None:
    """Makes the folder that is `filled` the one that is asked for."""
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-"
    ) as temporary:
        if folder.exists() and _fault(folder, settings) is not None:
            # Aside first: a folder that another process puts here meanwhile stays.
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, Path(temporary) / "faulty")
        os.rename(filled, folder)
    (folder / LOCK).unlink(missing_ok=True)


def stamp(paths: Iterable[Path]) -> str:
    """What stands for files, or folders, of the user's: their sizes and times."""
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def digest(folder: Path) -> str:
    """Of a prepared folder: of its settings, and of what its files hold."""
    return files.sha256(folder / MANIFEST)


def _fault(folder: Path, settings: Mapping) -> str | None:
    """Why `folder` is not what `settings` make, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["settings"] != settings:
            return "made with other settings"
        for name, digest in manifest["files"].items():
            if files.sha256(folder / name) != digest:
                return f"{name} was altered"
    except OSError as error:
        return f"{Path(error.filename).name} is missing or cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes an array_record file whose records can be read in any order; it is there
    whole or not at all."""
    from array_record.python import array_record_module  # not on every system

    aside = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.rename(path)


def by_split(folder: Path) -> dict[str, list[Path]]:
    """The array_record files of a prepared folder, by what their names begin with: a
    split, in the order of SPLITS, or what is not divided yet."""
    found = {}
    for path in sorted(folder.glob("*.array_record")):
        found.setdefault(path.name.split("-")[0].split(".")[0], []).append(path)
    order = {split: number for number, split in enumerate(SPLITS)}
    names = sorted(found, key=lambda name: order.get(name, len(SPLITS)))
    return {name: found[name] for name in names}


class Shard(NamedTuple):
    """A file of a split: its records are those of the examples `numbers`."""

    split: str
    name: str
    numbers: range


def shards(sizes: Mapping[str, int], most: int) -> list[Shard]:
    """The files that splits of these sizes are kept in, `most` records in each."""
    made = []
    for split, size in sizes.items():
        starts = range(0, size, most)
        for i, start in enumerate(starts):
            name = f"{split}-{i:05}-of-{len(starts):05}.array_record"
            made.append(Shard(split, name, range(start, min(start + most, size))))
    return made


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    records: Callable[[Shard], Iterable[bytes]],
    what: str,
    workers: int = 0,
) -> None:
    """Writes those of `shards` that `folder` does not have yet, in several processes.

    Args:
        folder: of the files.
        shards: to be written; what is in one depends on nothing but itself.
        records: makes those of a shard, in order; a partial of a module's function,
            which other processes find.
        what: they are, for the progress bar.
        workers: processes; 0: one for each processor, or this one alone where there
            are so few records that others would not have started by then.
    """
    left = [shard for shard in shards if not (folder / shard.name).exists()]
    few = sum(len(shard.numbers) for shard in left) < FEW
    workers = min(workers or (1 if few else os.cpu_count() or 1), len(left))
    if workers <= 1:
        made = (_write_shard(folder, shard, records) for shard in left)
        _show(made, shards, left, what)
        return
    # Not forked: threads that this process may have, such as JAX's, would be missing.
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    ) as pool:
        waiting = [pool.submit(_write_shard, folder, one, records) for one in left]
        try:
            made = concurrent.futures.as_completed(waiting)
            _show((future.result() for future in made), shards, left, what)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(folder: Path, shard: Shard, records: Callable) -> int:
    """Writes one; returns how many records it has."""
    write_records(folder / shard.name, records(shard))
    return len(shard.numbers)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, by whatever signal."""
    parent = multiprocessing.parent_process()

    def wait():
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Records:
    """Random access to the examples of array_record files, one after another.

    Args:
        paths: of the files.
        parse: record -> example; a function of a module, which worker processes find.

    Raises:
        ValueError: when an example is asked for: the file, which was whole when the
            data were loaded, has gone or was altered.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[bytes], Example]):
        self._where = paths[0] if len(paths) == 1 else paths[0].parent
        self._records = grain.sources.ArrayRecordDataSource(list(map(str, paths)))
        self._parse = parse

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index) -> Example:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, OSError) as error:
            first, *_ = str(error).splitlines() or [""]
            raise ValueError(
                f"{self._where} cannot be read ({first}); it is prepared again when "
                "the data are loaded"
            ) from error
        return self._parse(record)


def shown(records: Iterable[bytes], count: int, what: str) -> Iterator[bytes]:
    """`records` with a progress bar."""
    with bar() as progress:
        yield from progress.track(records, total=count, description=what)


def _show(made: Iterable[int], shards, left, what: str) -> None:
    """Waits for shards with a progress bar that counts their records."""
    total, missing = (sum(len(one.numbers) for one in some) for some in (shards, left))
    with bar() as progress:
        task = progress.add_task(what, total=total, completed=total - missing)
        for count in made:
            progress.advance(task, count)


def bar(count: ProgressColumn | None = None) -> Progress:
    """A progress bar that counts as `count` does, in numbers where it is None; silent
    where the output is no terminal."""
    console = Console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        count or MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
