"""Data that are computed or converted once and then read from disk.

A prepared folder holds array_record files and a manifest with the settings they were
made from and a digest of each. It is filled under another name and renamed when it is
complete, so that what was interrupted never looks finished.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import grain
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from train.data.sources import Example

MANIFEST = "manifest.json"


def prepare(
    folder: Path, settings: Mapping, write: Callable[[Path], None], what: str
) -> None:
    """Makes `folder` hold what `write(folder)` writes for `settings`.

    Nothing happens where it holds that already. A folder that is incomplete, whose
    files were altered or that other settings made is made anew. Several processes may
    do this at once.

    Args:
        folder: to be filled, its parents included.
        settings: everything that the files depend on, as JSON knows it.
        write: fills an empty folder; what it raises passes through and leaves nothing.
        what: the data's name, for messages.

    Raises:
        ValueError: this system has no array_record.
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
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-"
    ) as temporary:
        filled = Path(temporary) / folder.name
        filled.mkdir()
        write(filled)
        files = {path.name: _digest(path) for path in sorted(filled.iterdir())}
        manifest = {"settings": settings, "files": files}
        (filled / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists() and _fault(folder, settings) is not None:
            # Aside first: a folder that another process puts here meanwhile stays.
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, Path(temporary) / "faulty")
        try:
            os.rename(filled, folder)
        except OSError:
            # Another process was faster, which is as good.
            if _fault(folder, settings) is not None:
                raise


def _fault(folder: Path, settings: Mapping) -> str | None:
    """Why `folder` is not what `settings` make, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["settings"] != settings:
            return "made with other settings"
        for name, digest in manifest["files"].items():
            if _digest(folder / name) != digest:
                return f"{name} was altered"
    except OSError as error:
        return f"{Path(error.filename).name} is missing or cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes an array_record file whose records can be read in any order."""
    from array_record.python import array_record_module  # not on every system

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


class Records:
    """Random access to the examples of an array_record file.

    Args:
        path: of the file.
        parse: record -> example; a function of a module, which worker processes find.

    Raises:
        ValueError: when an example is asked for: the file, which was whole when the
            data were loaded, has gone or was altered.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Example]):
        self._path = path
        self._records = grain.sources.ArrayRecordDataSource(str(path))
        self._parse = parse

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index) -> Example:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, OSError) as error:
            first, *_ = str(error).splitlines() or [""]
            raise ValueError(
                f"{self._path} cannot be read ({first}); it is prepared again when the "
                "data are loaded"
            ) from error
        return self._parse(record)


def shown(records: Iterable[bytes], count: int, what: str) -> Iterator[bytes]:
    """`records` with a progress bar; silent where the output is no terminal."""
    console = Console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        yield from bar.track(records, total=count, description=what)
