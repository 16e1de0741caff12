"""The archive that the Long Range Arena publishes its data as, lra_release.gz.

https://storage.googleapis.com/long-range-arena/lra_release.gz, a tar file of 8 GB. What
a task needs of it is copied out as plain files; nothing else of it is, and no links.
"""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rich.progress import DownloadColumn

from train.data import original, prepared

# The folder of each task in it, and what of the folder is needed.
PARTS = {
    "listops": ("listops-1000", ""),
    "retrieval": ("tsv_data", ""),
    "pathfinder32": ("pathfinder32", "curv_contour_length_14"),
    "pathfinder64": ("pathfinder64", "curv_contour_length_14"),
    "pathx": ("pathfinder128", "curv_contour_length_14"),
    "path256": ("pathfinder256", "curv_contour_length_14"),
}
MOST_BYTES = 2**36  # of a part, far more than any has


def unpack(archive: Path, task: str, folder: Path) -> Path:
    """Copies what a task needs out of the archive; returns the folder that has it.

    Nothing happens where that is there already. What was interrupted leaves nothing.

    Args:
        archive: lra_release.gz.
        task: a key of PARTS.
        folder: gets the part, in a folder of its own.

    Raises:
        ValueError: a task that is not in the archive, an archive that is damaged,
            incomplete or without that part.
    """
    if task not in PARTS:
        raise ValueError(
            f"the archive has {', '.join(PARTS)}, and not {task}, got {archive}"
        )
    part, needed = PARTS[task]
    home = folder / part
    if home.exists():
        return home
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{part}-") as temporary:
        copied = Path(temporary) / part
        count, total = 0, 0
        for path, member, content in _members(archive, part):
            if needed and path.parts[0] != needed:
                continue
            count, total = count + 1, total + member.size
            if total > MOST_BYTES:
                raise ValueError(
                    f"{archive}: {part} must have {MOST_BYTES} bytes or fewer"
                )
            to = copied / path
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as file:
                shutil.copyfileobj(content, file)
        if not count:
            raise ValueError(
                f"{archive}: must have files of {part}/{needed}, has none: is it "
                "lra_release.gz of the Long Range Arena?"
            )
        copied.rename(home)
    return home


def _members(archive: Path, part: str) -> Iterator:
    """The files below a folder called `part`: their paths in it and what they hold.

    They are read one after another, as gzip cannot go back.
    """
    last = "its beginning"
    try:
        with (
            prepared.bar(DownloadColumn()) as bar,
            bar.open(
                archive, "rb", description=f"reading {part} of {archive}"
            ) as compressed,
            tarfile.open(fileobj=compressed, mode="r|gz") as members,
        ):
            for member in members:
                last = member.name
                names = PurePosixPath(member.name).parts
                if not member.isfile() or part not in names or ".." in names:
                    continue
                inside = names[names.index(part) + 1 :]
                if inside:
                    path = PurePosixPath(*inside)
                    yield path, member, members.extractfile(member)
    except original.DAMAGE as error:
        raise ValueError(
            f"{archive}: damaged or incomplete after {last} ({error}): fetch it again"
        ) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise ValueError(f"{archive}: cannot be read ({error.strerror})") from None
