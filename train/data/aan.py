"""Retrieval of the Long Range Arena: does one of two papers cite the other?

Pairs of the ACL Anthology Network, the files new_aan_pairs.{train,eval,test}.tsv in
lra_release/tsv_data of https://storage.googleapis.com/long-range-arena/lra_release.gz.
A line has a label, two names and two texts. `documents` has how they are read.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, documents, pipeline, prepared
from train.data.documents import Alphabet
from train.data.sources import SPLITS, Example
from train.data.spec import Spec

# To be raised with any change of what given files make.
VERSION = 1

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
CLASSES = ("unrelated", "cites")
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
FIELDS = 5
# Of a text, as in https://github.com/google-research/long-range-arena: what is beyond
# is not kept.
MOST_BYTES = 10_000
CHARACTERS = "characters.json"
LEAST = 1  # a character of the training texts has a token, however rare
PREFIX = 4  # bytes that say how long the first text is


def load(
    path: str = "",
    folder: str = "data/aan",
    length: int = 4000,
    variant: str = "lra",
) -> pipeline.Dataset:
    """Pairs of papers: inputs int32 [2, length]; targets 1 where one cites the other.

    Args:
        path: the folder with the arena's three files.
        folder: gets what is converted.
        length: tokens of a paper; longer ones are cut.
        variant: one of `documents.VARIANTS`.

    Raises:
        ValueError: a setting out of its bounds; a file that is missing or not the
            arena's.
    """
    checks.check_choice("variant", variant, documents.VARIANTS)
    checks.at_least("length", length, 2)
    home = prepare(path, folder)
    counts = json.loads((home / CHARACTERS).read_text())
    alphabet = documents.alphabet(variant, counts, LEAST, length)
    sources = {
        split: prepared.Records([_file(home, split)], _parse) for split in SPLITS
    }
    finish = functools.partial(_finish, alphabet=alphabet)
    digest = prepared.digest(home)
    return pipeline.Dataset(
        alphabet.spec(CLASSES), sources, finish=finish, digest=digest
    )


def prepare(path: str = "", folder: str = "data/aan") -> Path:
    """Converts the pairs that `load` reads, where that is not done, and returns their
    folder. Arguments and errors are those of `load`."""
    place = settings.place("data.path", path)
    files = {split: place / name for split, name in FILES.items()}
    missing = [file.name for file in files.values() if not path or not file.is_file()]
    if missing:
        raise ValueError(
            f"data.path must be a folder with {', '.join(missing)}, got {path!r}; they "
            "lie in lra_release/tsv_data of "
            "https://storage.googleapis.com/long-range-arena/lra_release.gz"
        )
    source = prepared.stamp(files.values())
    home = settings.place("data.folder", folder) / f"lra-{source}"
    made_from = {"version": VERSION, "source": source}
    prepared.prepare(home, made_from, lambda to: _convert(files, to), "AAN")
    return home


def spec(length: int = 4000, variant: str = "lra") -> Spec | None:
    """What the pairs say of themselves without their files; None where the characters
    that there are have to be counted."""
    checks.check_choice("variant", variant, documents.VARIANTS)
    return Alphabet(None, length).spec(CLASSES) if variant == "lra" else None


def _file(home: Path, split: str) -> Path:
    return home / f"{split}.array_record"


def _parse(record: bytes) -> Example:
    size = int.from_bytes(record[1 : 1 + PREFIX])
    first, second = record[1 + PREFIX :][:size], record[1 + PREFIX + size :]
    return {"target": np.int32(record[0]), "texts": (first, second)}


def _finish(example: Example, alphabet: Alphabet) -> Example:
    read = [alphabet.read(text) for text in example["texts"]]
    inputs, mask = (np.stack(both) for both in zip(*read, strict=True))
    return {"inputs": inputs, "targets": example["target"], "mask": mask}


def _convert(files: dict[str, Path], home: Path) -> None:
    counts = Counter()
    for split, file in files.items():
        with file.open("rb") as lines:
            size = sum(1 for _ in lines)
        pairs = prepared.shown(_pairs(file), size, f"reading {file.name}")
        records = _records(pairs, counts if split == "train" else None)
        prepared.write_records(_file(home, split), records)
    (home / CHARACTERS).write_text(json.dumps(dict(sorted(counts.items()))))


def _records(pairs, counts: Counter | None) -> Iterator[bytes]:
    """The records of pairs; the characters of their texts are counted on the way."""
    for label, *texts in pairs:
        if counts is not None:
            for text in texts:
                counts.update(text.decode("utf-8", "replace"))
        first, second = texts
        yield bytes([label]) + len(first).to_bytes(PREFIX) + first + second


def _pairs(file: Path) -> Iterator[tuple[int, bytes, bytes]]:
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            label = LABELS.get(fields[0].decode("ascii", "replace"))
            if len(fields) != FIELDS or label is None:
                raise ValueError(
                    f"{file}, line {number}: must have a label of 0 or 1, two names "
                    f"and two texts between tabs, got {len(fields)} fields, the first "
                    f"{fields[0][:20].decode('ascii', 'replace')!r}"
                )
            yield label, fields[3][:MOST_BYTES], fields[4][:MOST_BYTES]
    if not number:
        raise ValueError(f"{file}: must have a pair of papers, is empty")
