"""A file or folder of the user's, and errors that name it."""

from collections.abc import Sequence

from train import settings
from train.data import cast

RECORDINGS = ".wav"
TRAINED = "data.path"  # the key of what a run is trained on


class File:
    """The path of a file that ends in one of `suffixes`, and errors that name it.

    Args:
        path: as the user wrote it.
        suffixes: of the files that can be read.
        folders: whether it may also be a folder of recordings.
        key: what the path is called in messages: TRAINED, or the flag of a command
            that asks a run about the file.
        content: what such a file must hold, which is said where there is none.

    Raises:
        ValueError: there is no such file, or it is of another kind.
    """

    def __init__(
        self,
        path: str,
        suffixes: Sequence[str],
        folders: bool = False,
        key: str = TRAINED,
        content: str = "",
    ):
        cure = f"; it must hold {content} (docs/data.md)" if content else ""
        *others, last = suffixes
        kinds = f"{', '.join(others)} or {last}" if others else last
        folder = f" or a folder of {RECORDINGS} files" if folders else ""
        if not str(path):
            flag = f"--config.{key}=" if "." in key else ""
            raise ValueError(
                f"{key} must name an {kinds} file{folder}, such as {flag}my.npz; it is "
                "empty"
            )
        self.key, self.path = key, settings.place(key, path)
        if folders and self.path.is_dir():
            return
        if self.path.suffix.lower() not in suffixes:
            other = ""
            if folders and self.path.suffix.lower() == RECORDINGS:
                other = "; recordings are read from the folder that they lie in"
            elif folders and not self.path.suffix and not self.path.exists():
                raise ValueError(
                    f"{key}: there is no file or folder {str(path)!r}{cure}"
                )
            raise ValueError(
                f"{key} must end in {kinds}{folder and ', or be' + folder[3:]}, got "
                f"{str(path)!r}{other}"
            )
        if not self.path.is_file():
            if self.path.exists():
                raise ValueError(f"{key} must be a file, got the folder {str(path)!r}")
            raise ValueError(f"{key}: there is no file {str(path)!r}{cure}")

    @property
    def kind(self) -> str:
        """The suffix; that of recordings for a folder of them."""
        return RECORDINGS if self.path.is_dir() else self.path.suffix.lower()

    def in_training(self, cure: str) -> str:
        """A cure by a flag of `train.main`; "" where another command reads the file,
        which has none."""
        return cure if self.key == TRAINED else ""

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{self.path}: {key} {message}")

    def whole(self, key: str, array, lowest: int, size: int, mask=None):
        """The array as int32 in [lowest, size), -1 where the mask is False, and size,
        which 0 leaves to the array."""
        highest = (size or cast.MOST) - 1
        numbers = cast.whole(f"{self.path}: {key}", array, lowest, highest, mask)
        if numbers.max() < 0:
            raise self.error(key, "has no class at all, only -1")
        return numbers, size or int(numbers.max()) + 1
