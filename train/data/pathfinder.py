"""Pathfinder of the Long Range Arena: a picture, pixel by pixel, and whether one curve
joins its two disks. Path-X has 128 x 128 pixels.

https://arxiv.org/abs/2011.04006; `snakes` has what a picture is. Pictures are drawn
once below `data.folder`, each from its seed and number, or converted from the arena's
own files (pathfinder32, 64, 128 and 256 in lra_release.gz).
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train import settings
from train.data import checks, pipeline, prepared, snakes
from train.data.frames import read_image
from train.data.prepared import Shard
from train.data.snakes import Rules
from train.data.sources import SPLITS, Example, Picked, split_indices
from train.data.spec import Spec

# To be raised with any change of what given settings make.
VERSION = 1

# Of the sides 32 to 256 as the Long Range Arena has them (lra_benchmarks/data,
# pathfinder.py), with long snakes of 14 paddles. The generator's own defaults are what
# it leaves open: padding and distance at 256; no paddles that stand alone. 512 is 256,
# twice as large. 16 and 24 are no published task: the snakes are as much shorter as
# there is less room.
# fmt: off
RULES = {
    #           pad margin len thick radius contour dist cont. distractor contrast
    16: Rules(16, 1, (1,), 2, 0.5, 1.5, 5, 3, 1.0, 2, 1, 1.5),
    24: Rules(24, 1, (1,), 2, 0.5, 1.5, 9, 5, 1.0, 3, 2, 1.5),
    32: Rules(32, 1, (1,), 2, 0.5, 1.5, 14, 7, 1.0, 4, 5, 1.5),
    64: Rules(64, 1, (1,), 5, 1.0, 2.5, 14, 12, 1.8, 4, 5, 0.8),
    128: Rules(128, 1, (2, 3), 5, 1.5, 3.0, 14, 20, 1.8, 4, 8, 0.9),
    256: Rules(256, 22, (3,), 5, 2.0, 5.0, 14, 27, 1.8, 4, 7, 1.0),
    512: Rules(512, 44, (6,), 10, 4.0, 10.0, 14, 54, 1.8, 4, 7, 1.0),
}
# fmt: on
CLASSES = ("apart", "joined")

# What a pixel is to the model, as different publications have it.
VARIANTS = {
    "lra": "token",  # a number of 0 to 255 as one of so many tokens
    "s4": "scalar",  # in [0, 1]
    "s5": "scalar",  # in [-1, 1]
}
GREYS = 256

IN_A_SHARD = 2**24  # bytes, before compression
AT_ONCE = 2**22  # pixels that are drawn together

# Of the arena's own files: the hard pictures, whose parts are a tenth each.
EVERY = "every"  # the beginning of the names of their files
LRA_FOLDER = "curv_contour_length_14"
LRA_PART, LRA_SEED = 0.1, 42


def load(
    folder: str = "data/pathfinder",
    path: str = "",
    side: int = 32,
    contour: int = 0,
    train: int = 160_000,
    validation: int = 20_000,
    test: int = 20_000,
    variant: str = "s4",
    layout: str = "sequence",
    seed: int = 0,
) -> pipeline.Dataset:
    """Pathfinder: inputs [side^2], row by row; targets 1 where the disks are joined.

    Args:
        folder: what is drawn or converted goes to a folder of its own in it.
        path: a folder of the arena's own files, such as lra_release/pathfinder32; then
            `contour`, the sizes and `seed` are not read. The parts are 8, 1 and 1
            tenths: one after another with the variant "lra", else drawn with seed 42.
        side: of a picture, a key of RULES.
        contour: paddles of a long snake, three times those of a short one: 6 and 9 for
            the easier tasks; 0: as RULES has it.
        train, validation, test: numbers of pictures; 0: no such split.
        variant: a key of VARIANTS: what a pixel is.
        layout: "sequence", or "image": inputs [side, side, 1], not with tokens.
        seed: of the pictures, not of the run.

    Raises:
        ValueError: a setting out of its bounds; a file that is missing or not the
            arena's.
    """
    spec(side, variant, layout)
    sizes = {"train": train, "validation": validation, "test": test}
    home = prepare(folder, path, side, contour, **sizes, seed=seed)
    sources = {
        name: prepared.Records(paths, _parse)
        for name, paths in prepared.by_split(home).items()
    }
    if path:
        every = sources[EVERY]
        parts = _parts(len(every), variant)
        sources = {split: Picked(every, rows) for split, rows in parts}
    finish = functools.partial(_finish, variant=variant)
    digest = prepared.digest(home)
    dataset = pipeline.Dataset(
        spec(side, variant), sources, finish=finish, digest=digest
    )
    return pipeline.laid_out(dataset, layout, (side, side))


def spec(side: int = 32, variant: str = "s4", layout: str = "sequence") -> Spec:
    """What Pathfinder says of itself before there is any.

    Raises:
        ValueError: an unknown side, variant or layout.
    """
    if side not in RULES:
        raise ValueError(
            f"data.side must be one of {', '.join(map(str, RULES))}, got {side}"
        )
    checks.check_choice("variant", variant, tuple(VARIANTS))
    checks.check_choice("layout", layout, pipeline.LAYOUTS)
    encoder = VARIANTS[variant]
    if encoder == "token" and layout != "sequence":
        raise ValueError(
            f"data.layout must be sequence where data.variant is {variant}, whose "
            f"pixels are tokens, got {layout!r}"
        )
    made = Spec(
        encoder=encoder,
        length=side**2,
        outputs=len(CLASSES),
        loss="classification",
        channels=1,
        vocab_size=GREYS if encoder == "token" else 0,
        classes=CLASSES,
    )
    return pipeline.laid_out_spec(made, layout, (side, side))


def prepare(
    folder: str = "data/pathfinder",
    path: str = "",
    side: int = 32,
    contour: int = 0,
    train: int = 160_000,
    validation: int = 20_000,
    test: int = 20_000,
    seed: int = 0,
    workers: int = 0,
) -> Path:
    """Draws or converts the pictures that `load` reads, where they are not there yet,
    and returns their folder. What was interrupted goes on where it was.

    Args:
        folder, path, side, contour, train, validation, test, seed: see `load`.
        workers: processes that draw; 0: one for each processor. The pictures do not
            depend on it.

    Raises:
        ValueError: a setting out of its bounds; a file that is missing or not the
            arena's.
    """
    spec(side)
    checks.at_least("workers", workers, 0)
    if path:
        place = settings.place("data.path", path)
        made_from = {"source": prepared.stamp(_listed(place)), "side": side}
        name, doing = f"lra-{side}-{made_from['source']}", f"reading {place}"
        sizes = {EVERY: len(_labels(place))}
        records = functools.partial(_converted, path=place, side=side)
    else:
        sizes = {"train": train, "validation": validation, "test": test}
        for split, size in sizes.items():
            checks.at_least(split, size, int(split == "train"))
        settings.check_seed("data.seed", seed)
        rules = _rules(side, contour)
        made_from = {**rules._asdict(), **sizes, "seed": seed}
        name = "-".join(map(str, (side, rules.contour, *sizes.values(), seed)))
        doing = f"drawing Pathfinder-{side}"
        records = functools.partial(_drawn, rules=rules, seed=seed)
    home = settings.place("data.folder", folder) / name
    shards = prepared.shards(sizes, max(IN_A_SHARD // side**2, 1))

    def write(filled):
        prepared.write_shards(filled, shards, records, doing, workers)

    prepared.prepare(home, {"version": VERSION, **made_from}, write, "Pathfinder")
    return home


def _rules(side: int, contour: int) -> Rules:
    rules = RULES[side]
    if not contour:
        return rules
    if not 3 <= contour <= rules.contour:
        raise ValueError(
            f"data.contour must be 3 to {rules.contour} with data.side={side}, or 0, "
            f"got {contour}"
        )
    return rules._replace(contour=contour, distractor=contour // 3)


def _drawn(shard: Shard, rules: Rules, seed: int) -> Iterator[bytes]:
    """The records of the pictures of a shard."""
    numbers, at_once = shard.numbers, max(AT_ONCE // rules.side**2, 1)
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        pictures = snakes.draw(rules, some, seed, SPLITS.index(shard.split))
        for label, pixels in zip(pictures.labels, pictures.pixels, strict=True):
            yield bytes([label]) + pixels.tobytes()


def _parse(record: bytes) -> Example:
    pixels = np.frombuffer(record, np.uint8)
    return {"target": np.int32(pixels[0]), "pixels": pixels[1:]}


def _finish(example: Example, variant: str) -> Example:
    pixels = example["pixels"]
    if VARIANTS[variant] == "token":
        inputs = pixels.astype(np.int32)
    else:
        inputs = pixels.astype(np.float32) / 255
        if variant == "s5":
            inputs = 2 * inputs - 1
    mask = np.ones(len(pixels), bool)
    return {"inputs": inputs, "targets": example["target"], "mask": mask}


def _listed(path: Path) -> list[Path]:
    """The files that say what the arena's pictures are, in their order."""
    files = (path / LRA_FOLDER / "metadata").glob("*.npy")
    files = sorted((f for f in files if f.stem.isdecimal()), key=lambda f: int(f.stem))
    if not files:
        raise ValueError(
            f"data.path: no {LRA_FOLDER}/metadata/*.npy found in {path}; the arena's "
            "pictures lie in lra_release/pathfinder32, pathfinder64, pathfinder128 and "
            "pathfinder256 of https://storage.googleapis.com/long-range-arena/"
            'lra_release.gz; with an empty path, "", pictures are drawn'
        )
    return files


@functools.lru_cache(1)
def _labels(path: Path) -> list[tuple[Path, int]]:
    """The arena's pictures, in its order, and whether their disks are joined."""
    return [found for file in _listed(path) for found in _read_labels(path, file)]


def _read_labels(path: Path, file: Path) -> Iterator[tuple[Path, int]]:
    # Lines of text, in spite of the suffix.
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) < 4 or words[3] not in ("0", "1"):
            raise ValueError(
                f"{file}, line {number}: must have a folder, a file, a number and a "
                f"label of 0 or 1, got {line[:60]!r}"
            )
        picture = path / LRA_FOLDER / words[0] / words[1]
        if ".." in (*Path(words[0]).parts, words[1]) or Path(words[0]).is_absolute():
            raise ValueError(
                f"{file}, line {number}: must name a file below {LRA_FOLDER}, got "
                f"{words[0]}/{words[1]}"
            )
        yield picture, int(words[3])


def _converted(shard: Shard, path: Path, side: int) -> Iterator[bytes]:
    """The records of the pictures of a shard."""
    listed = _labels(path)
    for number in shard.numbers:
        picture, label = listed[number]
        pixels = read_image(str(picture), channels=1)
        if pixels.shape[:2] != (side, side):
            raise ValueError(
                f"{picture}: must have {side} x {side} pixels, as data.side says, has "
                f"{pixels.shape[0]} x {pixels.shape[1]}"
            )
        yield bytes([label]) + pixels.tobytes()


def _parts(count: int, variant: str) -> Iterator[tuple[str, np.ndarray]]:
    """The splits of the arena's pictures, as a tradition has them."""
    if variant != "lra":
        parts = split_indices(count, LRA_PART / (1 - LRA_PART), LRA_PART, LRA_SEED)
        yield from parts.items()
        return
    ends = [int(count * (1 - 2 * LRA_PART)), int(count * (1 - LRA_PART))]
    yield from zip(SPLITS, np.split(np.arange(count), ends), strict=True)
