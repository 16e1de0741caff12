"""The digest of a folder: the size and the sha256 of every file, in `digest.json`.

It is written last, aside and then renamed, so that a folder without it is not whole.
"""

import json
import stat
from pathlib import Path

from train.files import sha256, write_atomically

FILE = "digest.json"


def write(folder: Path) -> None:
    """Adds the digest of all files that are in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in files
    }
    write_atomically(folder / FILE, json.dumps(digest, indent=1))


def missing(folder: Path) -> bool:
    """Whether the digest, which is written last, is not there."""
    try:
        (folder / FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # not to be seen is not the same
        return False
    return False


def altered(folder: Path) -> str | None:
    """Which file of a folder is not the one that was saved, and why; None if all are.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        digest = json.loads((folder / FILE).read_text())
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in digest.items()
        }
    except FileNotFoundError:
        empty = folder.is_dir() and not any(folder.iterdir())
        return "the folder is empty" if empty else f"{FILE} is missing"
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OSError,
    ) as error:
        return f"{FILE} cannot be read ({type(error).__name__})"
    if not files:
        return f"{FILE} names no file"
    # Before any is opened: a link would lead out of the folder, a pipe would never end.
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"{path.relative_to(folder)} is a link or no file"
    for name, (size, hashed) in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            return f"{FILE} names {name}, outside of its folder"
        try:
            actual = (folder / name).lstat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            if sha256(folder / name) != hashed:
                return f"{name} has altered bytes"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
