"""Files of a run: written whole or not at all, and read with an error that says where.

What is read may come from anyone, be cut off or be altered: everything that is wrong
with it is a `ValueError` of one line, which names the file and, within it, the line.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SHOWN = 60  # characters of a line that an error quotes
KINDS = {dict: "object", list: "list", float: "number with a point"}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is there whole or not at all, even if the machine stops."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to be filled piece by piece, which becomes `path` once all of it is
    written; what ends the block with an error leaves what was at `path` before."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        remove(aside)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Removes a file, where that is there and can be done."""
    with contextlib.suppress(OSError):
        path.unlink()


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; None where there is no such file.

    Args:
        path: of the file.
        kind: dict, list or float: what the whole must be.

    Raises:
        ValueError: the file cannot be read, is no JSON, or holds something else.
    """
    try:
        text = _text(path)
    except FileNotFoundError:
        return None
    found = _parsed(path, text)
    if not isinstance(found, kind):
        raise ValueError(
            f"{path} must hold a JSON {KINDS[kind]}, got {quoted(text.strip())}"
        )
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return _text(path, errors="replace").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} cannot be read: line {line} must be UTF-8 text"
        ) from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        line = lines[min(error.lineno, len(lines)) - 1]
        raise ValueError(
            f"{path} cannot be read: line {error.lineno} must be JSON, got "
            f"{quoted(line)} ({error.msg})"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path} cannot be read: it must be JSON of some levels, got very many"
        ) from None
    except ValueError as error:  # such as a number of very many digits
        raise ValueError(f"{path} cannot be read: {error}") from None


def quoted(text: str) -> str:
    """The beginning of a text, as an error shows it."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


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
