"""The arrays of a checkpoint as its files declare them, before any is read.

Orbax keeps a state in an OCDBT database: a tree of keys whose leaves are short values
or places in data files. The array `name` is its description `name/.zarray` and its
chunks `name/0.0`, ... Tensorstore fills a chunk that is missing with zeros, allocates
whatever a description declares and follows a place wherever it points; all of that is
checked here.
"""

import json
import math
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts

MANIFEST = "manifest.ocdbt"
METADATA = "_METADATA"
DESCRIPTION = ".zarray"


class Stored(NamedTuple):
    """One array: its shape, its dtype as text, bytes in memory, and (file, end) of
    every piece of it that lies in a data file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    places: tuple[tuple[str, int], ...]


def contents(folder: Path) -> dict[str, Stored]:
    """The arrays of a saved state by name, such as "params.encoder.kernel".

    Args:
        folder: of the state, absolute, in a path that tensorstore takes literally.

    Raises:
        ValueError: the files contradict themselves or one another, or point out of
            the folder.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    descriptions, chunks = {}, {}
    for key, value, place in _entries(folder):
        name, _, part = key.rpartition("/")
        if place is not None:
            _check_place(folder, *place)
        if part == DESCRIPTION:
            descriptions[name] = value
        else:
            chunks.setdefault(name, []).append(place)
    arrays = {
        name: _stored(name, text, chunks.get(name, []))
        for name, text in descriptions.items()
    }
    missing = _named(folder) - set(arrays)
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    return arrays


def read_back(folder: Path, arrays: dict[str, Stored]) -> None:
    """Reads one array of every data file, the smallest, and one that is in none.

    Args:
        folder: as in `contents`.
        arrays: what `contents` returned for it.

    Raises:
        ValueError: one cannot be read.
    """
    smallest = {}
    for name, array in sorted(arrays.items(), key=lambda item: item[1].nbytes):
        for file in {file for file, _ in array.places} or {None}:
            smallest.setdefault(file, name)
    for name in sorted(set(smallest.values())):
        read(folder, name)


def read(folder: Path, name: str) -> np.ndarray:
    """One array. `ValueError` where it cannot be read."""
    kvstore = {"driver": "ocdbt", "base": _url(folder), "path": f"{name}/"}
    try:
        return ts.open({"driver": "zarr", "kvstore": kvstore}).result().read().result()
    except Exception as error:  # whichever tensorstore maps the fault to
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{name} cannot be read: {reason}") from None


def check_size(arrays: dict[str, Stored]) -> None:
    """Raises a `ValueError` where arrays are more than this machine's memory."""
    total = sum(array.nbytes for array in arrays.values())
    memory = _memory()
    if memory is not None and total > memory:
        largest = max(arrays, key=lambda name: arrays[name].nbytes)
        raise ValueError(
            f"its arrays declare {total:.3g} bytes ({largest}: "
            f"{list(arrays[largest].shape)}), more than the {memory:.3g} of this "
            "machine's memory"
        )


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not known to this system
        return None


def _url(folder: Path) -> str:
    return f"file://{urllib.parse.quote(str(folder))}/"


def _entries(folder: Path) -> Iterator[tuple[str, bytes | None, tuple | None]]:
    """(key, value if it lies in the tree, else place) of the newest version."""
    try:
        base = ts.KvStore.open(_url(folder)).result()
        version = ts.ocdbt.dump(base).result()["versions"][-1]
        root = version["root"]["location"]
        _check_place(folder, *_place(root))
        nodes = [(b"", root, version["root_height"])]
        while nodes:
            prefix, location, height = nodes.pop()
            for entry in ts.ocdbt.dump(base, location).result()["entries"]:
                key = prefix + entry["key"]
                if "location" in entry:
                    # Down at every step, so that a tree that bites its tail ends.
                    if height <= 0:
                        raise ValueError("a node of its tree is too deep")
                    _check_place(folder, *_place(entry["location"]))
                    below = prefix + entry.get("subtree_common_prefix", b"")
                    nodes.append((below, entry["location"], height - 1))
                elif "inline_value" in entry:
                    yield key.decode(), entry["inline_value"], None
                else:
                    place = _place(entry["indirect_value"])
                    value = None
                    if key.endswith(DESCRIPTION.encode()):
                        _check_place(folder, *place)
                        value = _slice(folder, entry["indirect_value"])
                    yield key.decode(), value, place
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__})") from None


def _parts(location: str) -> tuple[str, int, int]:
    """(file, offset, length) of a place such as "value:base/:d/name:offset:length"."""
    match = re.fullmatch(r"\w+:([^:]*):([^:]*):(\d+):(\d+)", location)
    if not match:
        raise ValueError(f"a place in its files is unclear: {location[:80]!r}")
    base, file, offset, length = match.groups()
    return urllib.parse.unquote(base + file), int(offset), int(length)


def _place(location: str) -> tuple[str, int]:
    file, offset, length = _parts(location)
    return file, offset + length


def _slice(folder: Path, location: str) -> bytes:
    file, offset, length = _parts(location)
    with (folder / file).open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _check_place(folder: Path, file: str, end: int) -> None:
    parts = file.split("/")
    if file.startswith("/") or ".." in parts or "\\" in file or "\0" in file:
        raise ValueError(f"{file} lies outside of its folder")
    try:
        size = (folder / file).stat().st_size
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    if size < end:
        raise ValueError(f"{file} has {size} bytes, but {end} are used")


def _stored(name: str, text: bytes | None, places: list) -> Stored:
    try:
        description = json.loads(text)
        shape, chunk = (
            tuple(map(int, description[key])) for key in ("shape", "chunks")
        )
        dtype = str(description["dtype"])
        wide = re.search(r"(\d+)$", dtype)
        itemsize = int(wide[1]) if wide and not dtype.startswith("bfl") else 2
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{name}/{DESCRIPTION} is damaged") from None
    if len(shape) != len(chunk) or min((*shape, *chunk), default=0) < 0:
        raise ValueError(f"{name}/{DESCRIPTION} is damaged")
    if any(c > max(n, 1) or (c < 1 <= n) for n, c in zip(shape, chunk, strict=True)):
        raise ValueError(f"{name} of shape {list(shape)} declares chunks {list(chunk)}")
    expected = math.prod(-(-n // max(c, 1)) for n, c in zip(shape, chunk, strict=True))
    if len(places) != expected:
        raise ValueError(f"{name} has {len(places)} chunks instead of {expected}")
    nbytes = math.prod(shape) * itemsize
    return Stored(shape, dtype, nbytes, tuple(p for p in places if p is not None))


def _named(folder: Path) -> set[str]:
    """The arrays that the state's structure names."""
    try:
        tree = json.loads((folder / METADATA).read_text())["tree_metadata"]
        return {
            ".".join(str(part["key"]) for part in leaf["key_metadata"])
            for leaf in tree.values()
            if not leaf["value_metadata"]["skip_deserialize"]
        }
    except OSError as error:
        raise ValueError(f"{METADATA}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{METADATA} is damaged") from None
