"""Text of the Long Range Arena: is a film review in favour of the film?

The Large Movie Review Dataset of A. L. Maas et al.,
https://ai.stanford.edu/~amaas/data/sentiment: 25,000 reviews to train on and 25,000 to
test, half of each in favour. `documents` has how they are read. Both traditions choose
their step by the test reviews; `data.validation` keeps some training reviews for that.
"""

import functools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, documents, original, pipeline, prepared
from train.data.documents import Alphabet
from train.data.original import Original
from train.data.sources import Example, Picked, split_indices
from train.data.spec import Spec

# To be raised with any change of what given files make.
VERSION = 1

FOLDER = "aclImdb"
REVIEWS = Original(
    "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    84_125_825,
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    unpacked=FOLDER,
)
PARTS, LABELS = ("train", "test"), ("neg", "pos")
EACH = 12_500  # reviews of a part and label
LONGEST = 2**20  # bytes of a review, far more than any has

CHARACTERS = "characters.json"
LEAST = 15  # times that a character must occur to have a token of its own
SEED = 42  # of the reviews that are kept for validation


def load(
    folder: str = "data/imdb",
    length: int = 4096,
    variant: str = "lra",
    validation: float = 0.0,
    download: bool = False,
) -> pipeline.Dataset:
    """IMDB reviews: inputs int32 [length]; targets 1 where in favour.

    Args:
        folder: with aclImdb_v1.tar.gz or the folder aclImdb that it unpacks to; gets
            what is converted.
        length: tokens of a review; longer ones are cut.
        variant: one of `documents.VARIANTS`.
        validation: share of the training reviews that choose the step; 0: the test
            reviews do, as in both traditions.
        download: fetch what is missing.

    Raises:
        ValueError: a setting out of its bounds; a file that is missing, damaged or not
            of the dataset.
    """
    checks.check_choice("variant", variant, documents.VARIANTS)
    checks.at_least("length", length, 2)
    if not 0 <= validation < 1:
        raise ValueError(f"data.validation must be in [0, 1), got {validation}")
    home = prepare(folder, download)
    counts = json.loads((home / CHARACTERS).read_text())
    alphabet = documents.alphabet(variant, counts, LEAST, length)
    train, test = (prepared.Records([_file(home, part)], _parse) for part in PARTS)
    sources = {"train": train, "validation": test, "test": test}
    if validation:
        labels = np.repeat(np.arange(len(LABELS)), EACH)
        parts = split_indices(len(train), validation, 0.0, SEED, labels)
        for split in ("train", "validation"):
            sources[split] = Picked(train, parts[split])
    finish = functools.partial(_finish, alphabet=alphabet)
    digest = prepared.digest(home)
    return pipeline.Dataset(
        alphabet.spec(LABELS), sources, finish=finish, digest=digest
    )


def prepare(folder: str = "data/imdb", download: bool = False) -> Path:
    """Converts the reviews that `load` reads, where that is not done, and returns their
    folder. Arguments and errors are those of `load`."""
    place = settings.place("data.folder", folder)
    (path,) = original.locate("IMDB", place, (REVIEWS,), download)
    source = prepared.stamp(_reviews(path) if path.is_dir() else [path])
    made_from = {"version": VERSION, "each": EACH, "source": source}
    home = place / f"reviews-{source}"
    prepared.prepare(home, made_from, lambda to: _convert(path, to), "IMDB")
    return home


def spec(length: int = 4096, variant: str = "lra") -> Spec | None:
    """What the reviews say of themselves without their file; None where the characters
    that there are have to be counted."""
    checks.check_choice("variant", variant, documents.VARIANTS)
    return Alphabet(None, length).spec(LABELS) if variant == "lra" else None


def _file(home: Path, part: str) -> Path:
    return home / f"{part}.array_record"


def _parse(record: bytes) -> Example:
    return {"target": np.int32(record[0]), "text": record[1:]}


def _finish(example: Example, alphabet: Alphabet) -> Example:
    inputs, mask = alphabet.read(example["text"])
    return {"inputs": inputs, "targets": example["target"], "mask": mask}


def _convert(path: Path, home: Path) -> None:
    found = {(part, label): {} for part in PARTS for label in LABELS}
    for part, label, name, text in _in_folder(path) if path.is_dir() else _in_tar(path):
        found[part, label][name] = text
    for (part, label), reviews in found.items():
        if len(reviews) != EACH:
            raise ValueError(
                f"{path}: {FOLDER}/{part}/{label} must have {EACH:,} reviews, has "
                f"{len(reviews):,}"
            )
    for part in PARTS:
        records = [
            bytes([number]) + found[part, label][name]
            for number, label in enumerate(LABELS)
            for name in sorted(found[part, label])
        ]
        shown = prepared.shown(records, len(records), f"converting IMDB {part}")
        prepared.write_records(_file(home, part), shown)
    texts = (text for label in LABELS for text in found["train", label].values())
    (home / CHARACTERS).write_text(json.dumps(documents.count(texts)))


def _in_folder(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for file in _reviews(path):
        with file.open("rb") as review:
            part, label, name = file.parts[-3:]
            yield part, label, name, review.read(LONGEST)


def _reviews(path: Path) -> list[Path]:
    """The files of the unpacked folder."""
    folders = (path / part / label for part in PARTS for label in LABELS)
    return [file for folder in folders for file in sorted(folder.glob("*.txt"))]


def _in_tar(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Reads members without extracting anything."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                *_, part, label, name = ("", "", *member.name.split("/"))
                review = part in PARTS and label in LABELS and name.endswith(".txt")
                if member.isfile() and review:
                    text = archive.extractfile(member).read(LONGEST)
                    yield part, label, name, text
    except original.DAMAGE as error:
        raise ValueError(f"{path}: damaged or incomplete ({error})") from None
