"""Original files of public datasets: found in a folder or fetched, and read.

IDX (MNIST) and the binary version of CIFAR-10: fixed layouts of bytes, so that nothing
that a file holds is ever executed.
"""

import gzip
import hashlib
import math
import queue
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

UNSIGNED_BYTES = 8  # IDX's code for the type
LABEL_BYTES, PIXEL_BYTES = 1, 3 * 32 * 32  # of a CIFAR-10 record
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_CLASSES = 10

# More than any of the files here has once it is unpacked: archives can be made that
# unpack without end.
MOST_BYTES = 2**30
CIFAR_IMAGES = 10_000  # of a file

PATIENCE, READ = 10.0, 30.0  # seconds until a server answers, and between its parts

LONGEST = CIFAR_IMAGES * (LABEL_BYTES + PIXEL_BYTES)
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


class Original(NamedTuple):
    """A published file, and what it is called once it is unpacked."""

    url: str
    size: int
    sha256: str
    unpacked: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def locate(
    what: str, folder: Path, originals: Sequence[Original], download: bool
) -> list[Path]:
    """Where each of `originals` lies in `folder`, unpacked or as it is published.

    Args:
        what: the dataset's name, for messages.
        folder: of the files.
        originals: to be found.
        download: fetch what is missing and check its digest.

    Raises:
        ValueError: a file is missing, or cannot be fetched as it was published; says
            from where to fetch it and where to put it.
    """
    missing = [original for original in originals if not _found(folder, original)]
    failure = ""
    if missing and download:
        try:
            _download(folder, missing)
            missing = []
        except Exception as error:  # of the network, the server, the disk, the digest
            failure = f" (fetching failed: {error})"
    if missing:
        names = ", ".join(f"{one.unpacked} (or {one.name})" for one in missing)
        raise ValueError(
            f"{what}: {folder} lacks {names}{failure}. Put there what "
            f"{' '.join(one.url for one in missing)} gives, or name the folder that "
            "has it with --config.data.folder, or let --config.data.download=True "
            "fetch it"
        )
    return [_found(folder, original) for original in originals]


def _found(folder: Path, original: Original) -> Path | None:
    candidates = (folder / original.unpacked, folder / original.name)
    return next((path for path in candidates if path.exists()), None)


def _download(folder: Path, originals: Sequence[Original]) -> None:
    """Fetches to a temporary folder; only what has the right digest is moved."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        for original in originals:
            path = Path(temporary) / original.name
            _fetch(original, path)
            path.rename(folder / original.name)


def _fetch(original: Original, path: Path) -> None:
    """Writes what the address gives to `path`. `ValueError` for another file, and what
    the network raises."""
    print(f"fetching {original.url} ({original.size / 1e6:.1f} MB)", flush=True)
    digest, size = hashlib.sha256(), 0
    with _answer(original.url) as response, path.open("wb") as file:
        response.raise_for_status()
        for part in response.iter_content(2**20):
            size += len(part)
            if size > original.size:
                break
            digest.update(part)
            file.write(part)
    if (size, digest.hexdigest()) != (original.size, original.sha256):
        raise ValueError(
            f"{original.url} has another size or checksum than the published file: "
            f"{size} bytes instead of {original.size}"
        )


def _answer(url: str):
    """The response of a server, of which the body is yet to be read.

    A host can have a dozen addresses that are tried one after another, and a name that
    nobody resolves takes its time too: all that together must not be longer than
    PATIENCE, so that it is done in a thread that is left behind.

    Raises:
        OSError: no connection, or no answer in time.
    """
    import requests  # only needed here

    answers = queue.SimpleQueue()

    def ask():
        try:
            answers.put(requests.get(url, stream=True, timeout=(PATIENCE, READ)))
        except Exception as error:  # raised again in the calling thread
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"no answer from {url} in {PATIENCE:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The bytes of an IDX file, plain or .gz, as an array uint8 with `rank` axes.

    The layout: two zero bytes, the code of the type, the number of axes, the axes'
    lengths as big-endian 32-bit numbers, the values, the last axis fastest.

    Raises:
        ValueError: a file of another layout or length.
    """
    unpacked = gzip.open if path.suffix == ".gz" else open
    try:
        with unpacked(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or incomplete ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: must have {MOST_BYTES} bytes or fewer, unpacked")
    magic = bytes([0, 0, UNSIGNED_BYTES, rank])
    header = len(magic) + 4 * rank
    if content[: len(magic)] != magic or len(content) < header:
        raise ValueError(
            f"{path}: an IDX file of bytes with {rank} axes begins with {magic.hex()}, "
            f"this one with {content[: len(magic)].hex() or 'nothing'}"
        )
    shape = [int(n) for n in np.frombuffer(content[len(magic) : header], ">u4")]
    if 0 in shape:
        raise ValueError(f"{path}: must have 1 or more along each axis, got {shape}")
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: {math.prod(shape)} bytes must follow its header, which says "
            f"{shape}; there are {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] and labels uint8 [n] of CIFAR-10's binary version.

    A record is the label and the 32 x 32 red, then green, then blue values.

    Args:
        path: the folder cifar-10-batches-bin or the .tar.gz that holds it.
        names: of the files to be read, one after another.

    Raises:
        ValueError: a file is missing or has another layout.
    """
    contents = _folder_files(path, names) if path.is_dir() else _tar_files(path, names)
    images, labels = [], []
    for name, content in zip(names, contents, strict=True):
        size = LABEL_BYTES + PIXEL_BYTES
        if len(content) > LONGEST:
            raise ValueError(
                f"{path}: {name} has more than {CIFAR_IMAGES} images of {size} bytes"
            )
        if not content or len(content) % size:
            raise ValueError(
                f"{path}: {name} has {len(content)} bytes; CIFAR-10's binary version "
                f"has {size} per image"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        if records[:, 0].max() >= CIFAR_CLASSES:
            raise ValueError(
                f"{path}: {name} has the label {records[:, 0].max()}; CIFAR-10's are 0 "
                f"to {CIFAR_CLASSES - 1}"
            )
        labels.append(records[:, 0])
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.concatenate(images), np.concatenate(labels)


def _folder_files(path: Path, names: Sequence[str]) -> list[bytes]:
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} not found in it")
    contents = []
    for name in names:
        with (path / name).open("rb") as file:
            contents.append(file.read(LONGEST + 1))
    return contents


def _tar_files(path: Path, names: Sequence[str]) -> list[bytes]:
    """Reads members without extracting anything."""
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.offset_data + member.size > MOST_BYTES:
                    raise ValueError(
                        f"{path}: must have {MOST_BYTES} bytes or fewer, unpacked; "
                        f"{member.name[:40]!r} ends beyond"
                    )
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and name in names and folder.endswith(CIFAR_FOLDER):
                    contents[name] = archive.extractfile(member).read(LONGEST + 1)
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or incomplete ({error})") from None
    missing = [name for name in names if name not in contents]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} not found in it")
    return [contents[name] for name in names]
