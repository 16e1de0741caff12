"""Original files of public datasets: found in a folder or fetched, and read.

IDX (MNIST) and the binary version of CIFAR-10: fixed layouts of bytes, so that nothing
that a file holds is ever executed.
"""

import gzip
import math
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

UNSIGNED_BYTES = 8  # IDX's code for the type
LABEL_BYTES, PIXEL_BYTES = 1, 3 * 32 * 32  # of a CIFAR-10 record
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_CLASSES = 10

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
    from tensorflow_datasets.core import download  # 1 s, only needed here

    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        original.url: download.checksums.UrlInfo(
            size=original.size, checksum=original.sha256, filename=original.name
        )
        for original in originals
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        manager = download.DownloadManager(
            download_dir=temporary, url_infos=infos, force_checksums_validation=True
        )
        fetched = manager.download(
            {original.name: original.url for original in originals}
        )
        for name, path in fetched.items():
            Path(path).rename(folder / name)


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The bytes of an IDX file, plain or .gz, as an array uint8 with `rank` axes.

    The layout: two zero bytes, the code of the type, the number of axes, the axes'
    lengths as big-endian 32-bit numbers, the values, the last axis fastest.

    Raises:
        ValueError: a file of another layout or length.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or incomplete ({error})") from None
    magic = bytes([0, 0, UNSIGNED_BYTES, rank])
    header = len(magic) + 4 * rank
    if content[: len(magic)] != magic or len(content) < header:
        raise ValueError(
            f"{path}: an IDX file of bytes with {rank} axes begins with {magic.hex()}, "
            f"this one with {content[: len(magic)].hex() or 'nothing'}"
        )
    shape = [int(n) for n in np.frombuffer(content[len(magic) : header], ">u4")]
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
    return [(path / name).read_bytes() for name in names]


def _tar_files(path: Path, names: Sequence[str]) -> list[bytes]:
    """Reads members without extracting anything."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and name in names and folder.endswith(CIFAR_FOLDER):
                    found[name] = archive.extractfile(member).read()
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or incomplete ({error})") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} not found in it")
    return [found[name] for name in names]
