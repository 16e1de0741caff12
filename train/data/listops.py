"""ListOps: the value, a digit, of nested lists such as [MAX 4 [MIN 2 3 ] 9 ].

As in the Long Range Arena (https://arxiv.org/abs/2011.04006): from the root downwards,
a node is an operator with probability 1/4 and else a digit 0-9; at the greatest depth
it is always a digit. Operators, digits and the number of arguments, 2 to `max_args`,
are uniform. A length is the number of tokens, see `expressions`. Expressions outside of
the length range and those drawn before are dropped; train, validation and test follow
one another in the draw.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, expressions, pipeline, prepared
from train.data.expressions import EOS, PAD, TOKENS, Rules
from train.data.sources import Example
from train.data.spec import Spec

# To be raised with any change of what given settings make.
VERSION = 1

LRA_FILES = {
    "train": "basic_train.tsv",
    "validation": "basic_val.tsv",
    "test": "basic_test.tsv",
}


def load(
    folder: str = "data/listops",
    path: str = "",
    train: int = 96_000,
    validation: int = 2_000,
    test: int = 2_000,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
) -> pipeline.Dataset:
    """ListOps, generated once below `folder`, or converted from the LRA's own files.

    inputs: int32 [max_length], the tokens, EOS, and PAD to the end. targets: 0-9. The
    defaults are the LRA's. The examples depend on the settings, not on the machine.

    Args:
        folder: what is generated or converted goes to a folder of its own in it.
        path: a folder with the LRA's basic_train.tsv, basic_val.tsv and basic_test.tsv;
            then only `folder` and `max_length` are read.
        train, validation, test: numbers of examples; 0: no such split.
        min_length, max_length: lengths lie between, both excluded.
        max_depth: of an expression, the root counted.
        max_args: arguments of an operator.
        seed: of the draw, not of the run.

    Raises:
        ValueError: a setting out of its bounds or without enough expressions; a file
            that is missing or not the LRA's.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    rules = Rules(min_length, max_length, max_depth, max_args)
    home = prepare(folder, path, **sizes, **rules._asdict(), seed=seed)
    sources = {
        split: prepared.Records(paths, _parse)
        for split, paths in prepared.by_split(home).items()
    }
    return pipeline.Dataset(
        spec(max_length),
        sources,
        finish=functools.partial(_finish, length=max_length),
        digest=prepared.digest(home),
    )


def prepare(
    folder: str = "data/listops",
    path: str = "",
    train: int = 96_000,
    validation: int = 2_000,
    test: int = 2_000,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
    workers: int = 0,
) -> Path:
    """Makes the expressions that `load` reads, where they are not there yet, and
    returns their folder.

    Args:
        folder, path, train, validation, test, min_length, max_length, max_depth,
        max_args, seed: see `load`.
        workers: threads; 0: one for each processor.

    Raises:
        ValueError: see `load`.
    """
    if path:
        checks.at_least("max_length", max_length, 2)
        made_from, write = _from_lra(settings.place("data.path", path), max_length)
        name = f"lra-{made_from['source']}-{max_length}"
    else:
        rules = Rules(min_length, max_length, max_depth, max_args)
        sizes = {"train": train, "validation": validation, "test": test}
        _check(sizes, rules, seed)
        made_from = {**rules._asdict(), **sizes, "seed": seed}
        write = functools.partial(
            _generate, sizes=sizes, rules=rules, seed=seed, workers=workers
        )
        name = "-".join(map(str, (*rules, *sizes.values(), seed)))
    home = settings.place("data.folder", folder) / name
    prepared.prepare(home, {"version": VERSION, **made_from}, write, "ListOps")
    return home


def spec(max_length: int = 2_000) -> Spec:
    """What ListOps says of itself before there is any."""
    return Spec(
        encoder="token",
        length=max_length,
        channels=1,
        vocab_size=expressions.VOCAB_SIZE,
        outputs=expressions.DIGITS,
        loss="classification",
        padded=True,
        symbols=(*expressions.SPECIALS, *expressions.SYMBOLS),
    )


def _file(home: Path, split: str) -> Path:
    return home / f"{split}.array_record"


def _record(value: int, tokens: bytes) -> bytes:
    return bytes([value]) + tokens


def _parse(record: bytes) -> Example:
    return {"target": np.int32(record[0]), "tokens": np.frombuffer(record[1:], "u1")}


def _finish(example: Example, length: int) -> Example:
    tokens = example["tokens"]
    inputs = np.full(length, PAD, np.int32)
    inputs[: len(tokens)] = tokens
    inputs[len(tokens)] = EOS
    mask = np.arange(length) <= len(tokens)
    return {"inputs": inputs, "targets": example["target"], "mask": mask}


def _generate(home, sizes: Mapping[str, int], rules: Rules, seed, workers) -> None:
    drawn = itertools.starmap(_record, expressions.distinct(rules, seed, workers))
    for split, size in sizes.items():
        if size:
            records = itertools.islice(drawn, size)
            records = prepared.shown(records, size, f"generating ListOps {split}")
            prepared.write_records(_file(home, split), records)


def _check(sizes: Mapping[str, int], rules: Rules, seed: int) -> None:
    least = {"train": 1, "validation": 0, "test": 0, "seed": 0, "min_length": 1}
    least |= {"max_length": rules.min_length + 2, "max_depth": 2, "max_args": 2}
    for name, value in {**sizes, "seed": seed, **rules._asdict()}.items():
        if value < least[name]:
            raise ValueError(f"data.{name} must be {least[name]} or more, got {value}")
    longest = 1
    for _ in range(rules.max_depth - 1):
        longest = min(2 + rules.max_args * longest, rules.max_length)
    if longest <= rules.min_length:
        raise ValueError(
            f"data.min_length must be below {longest}, the greatest length with "
            f"max_depth {rules.max_depth} and max_args {rules.max_args}, "
            f"got {rules.min_length}"
        )


def _from_lra(path: Path, max_length: int):
    """The settings that stand for the LRA's files in `path`, and what converts them."""
    files = {split: path / name for split, name in LRA_FILES.items()}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(
            f"data.path: {', '.join(missing)} not found in {path}; they lie in "
            "lra_release/listops-1000 of "
            "https://storage.googleapis.com/long-range-arena/lra_release.gz; with an "
            'empty path, "", the task is generated'
        )
    source = prepared.stamp(files.values())

    def convert(home: Path) -> None:
        for split, file in files.items():
            with file.open("rb") as lines:
                count = sum(1 for _ in lines) - 1
            records = _lra_records(file, max_length)
            records = prepared.shown(records, count, f"converting {file.name}")
            prepared.write_records(_file(home, split), records)

    return {"source": source, "max_length": max_length}, convert


def _lra_records(file: Path, max_length: int) -> Iterator[bytes]:
    """Reads lines such as "( ( [MIN 3 ) ] )<tab>3"; the parentheses say nothing."""
    number = 0  # of the last line that was read below the header
    try:
        with file.open(encoding="utf-8") as lines:
            header = next(lines, "").rstrip("\n")
            if header != "Source\tTarget":
                raise ValueError(
                    f"the first line must be Source<tab>Target, got {header[:40]!r}"
                )
            for number, line in enumerate(lines, 2):  # noqa: B007, messages have it
                yield _lra_record(line, max_length)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a UTF-8 text file ({error.reason})") from None
    except ValueError as error:
        line = f", line {number}" if number else ""
        raise ValueError(f"{file}{line}: {error}") from None
    if not number:
        raise ValueError(f"{file}: must have an example below its first line")


def _lra_record(line: str, max_length: int) -> bytes:
    source, tab, target = line.rstrip("\n").partition("\t")
    words = source.replace("(", " ").replace(")", " ").split()
    unknown = sorted(set(words) - set(TOKENS))
    if unknown:
        raise ValueError(f"unknown symbol {unknown[0]!r}")
    if len(words) >= max_length:
        raise ValueError(
            f"{len(words)} tokens; data.max_length must be above, it is {max_length}"
        )
    tokens = bytes(map(TOKENS.__getitem__, words))
    value = expressions.value(tokens)
    if not tab or target != str(value):
        raise ValueError(f"the target is {target!r}, but the value is {value}")
    return _record(value, tokens)
