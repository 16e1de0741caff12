"""Small files as the Long Range Arena publishes its data, made on the spot."""

import io
import itertools
import tarfile

from PIL import Image

from train.data import expressions, pathfinder, snakes
from train.data.expressions import CLOSE, OPEN, SYMBOLS, ZERO, Rules

RULES = Rules(10, 50, 4, 4)
OPINIONS = {"neg": ["Bad \N{PILE OF POO}!", "tedious"], "pos": ["Good, good.", "né"]}
REVIEWS = {
    f"aclImdb/{part}/{label}/{number}_5.txt": f"{part} {review}"
    for part in ("train", "test")
    for label, reviews in OPINIONS.items()
    for number, review in enumerate(reviews)
}
PAIRS = {
    "train": ["1.0\tA1\tA2\tOne paper\tanother", "0\tB1\tB2\tThe end\tof it"],
    "eval": ["0.0\tC1\tC2\tfar\taway"],
    "test": ["1\tD1\tD2\tnew\told"],
}


def everything(dataset, split):
    (batch,) = dataset.evaluation(split, dataset.num_examples(split))
    return batch


def take(rules, count, seed=0, workers=1):
    return list(itertools.islice(expressions.distinct(rules, seed, workers), count))


def write_listops(folder, **replaced):
    """Small files as the LRA publishes them, and the expressions in them."""
    drawn = iter(take(RULES, 60))
    made = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 40), ("val", 10), ("test", 10)):
        made[name] = list(itertools.islice(drawn, count))
        lines = [f"{nested(tokens)}\t{value}" for value, tokens in made[name]]
        content = "\r\n".join(["Source\tTarget", *lines, ""])
        (folder / f"basic_{name}.tsv").write_bytes(replaced.get(name, content).encode())
    return made


def nested(tokens):
    """The parentheses around every two neighbours, as in the LRA's files."""
    stack = [[]]
    for token in tokens:
        word = SYMBOLS[token - ZERO]
        if token >= OPEN and token != CLOSE:
            stack.append([word])
        elif token == CLOSE:
            *rest, last = [*stack.pop(), word]
            tree = rest[0]
            for item in [*rest[1:], last]:
                tree = f"( {tree} {item} )"
            stack[-1].append(tree)
        else:
            stack[-1].append(word)
    return stack[0][0]


def write_pathfinder(folder, count=20, side=32, lines=None):
    """Pictures as the arena publishes them, in two lots; their pixels and labels."""
    drawn = snakes.draw(pathfinder.RULES[32], range(count), 7)
    top = folder / "curv_contour_length_14"
    (top / "metadata").mkdir(parents=True)
    for lot in range(2):
        (top / "imgs" / str(lot)).mkdir(parents=True)
        listed = []
        for i in range(lot * count // 2, (lot + 1) * count // 2):
            name = f"sample_{i}.png"
            Image.fromarray(drawn.pixels[i]).save(top / f"imgs/{lot}/{name}")
            listed.append(f"imgs/{lot} {name} {i} {drawn.labels[i]} 1.0 14 1 2 1 1 4 2")
        text = "\n".join(listed if lines is None or lot else lines)
        (top / f"metadata/{lot}.npy").write_text(text + "\n")
    return drawn


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_reviews(folder):
    """The archive of the film reviews."""
    others = {"aclImdb/README": "neg", "aclImdb/train/unsup/0_0.txt": "no label"}
    tar(folder / "aclImdb_v1.tar.gz", others | REVIEWS)


def write_pairs(folder, **replaced):
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in (PAIRS | replaced).items():
        text = "".join(line + "\n" for line in lines)
        (folder / f"new_aan_pairs.{part}.tsv").write_text(text)
    return dict(name="aan", path=str(folder), folder=str(folder.parent / "made"))
