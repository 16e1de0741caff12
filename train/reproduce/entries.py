"""What the ledger has: which runs are to be made, and what was published of them."""

from collections.abc import Mapping
from typing import NamedTuple

CPU, GPU = "2 CPU cores", "one GPU"

DFT = "https://arxiv.org/abs/2206.11893"
S5 = "https://arxiv.org/abs/2208.04933"


class Published(NamedTuple):
    """A score of a paper on the same task, at the same size, by the same metric."""

    score: float
    source: str


class Entry(NamedTuple):
    """A row of the ledger for each of its layers and variants.

    Attributes:
        title: of the task, with its tokens.
        config: `FILE:ARGUMENT` of `configs/`, to which `,layer=NAME` is added.
        layers: keys of LAYER_ARGS.
        overrides: dotted key of the config -> value.
        variants: name -> more of these; "" where there is one.
        only: variant -> the layers that it is for; all where it is not here.
        seeds: of the runs.
        machine: what they are for.
        published: layer -> its score.
    """

    title: str
    config: str
    layers: tuple[str, ...]
    overrides: Mapping[str, object] = {}
    variants: Mapping[str, Mapping[str, object]] = {"": {}}
    only: Mapping[str, tuple[str, ...]] = {}
    seeds: tuple[int, ...] = (0, 1, 2)
    machine: str = CPU
    published: Mapping[str, Published] = {}


# In the order in which `docs/results.md` shows them.
SCRATCH_OR_NOT = {
    "from scratch": {},
    "self-pretrained": {"pretrain.steps": 2_000, "pretrain.scratch": False},
}
ENTRIES = {
    "smnist": Entry(
        "sequential MNIST, 784 tokens, small models",
        "pixels:smnist,scale=small",
        ("s5", "s4d", "lstm"),
    ),
    "pathfinder16": Entry(
        "Pathfinder, 16 x 16 = 256 tokens, small models",
        "lra:pathfinder16,scale=small",
        ("s5", "s4d", "attention"),
        variants=SCRATCH_OR_NOT,
        only={"self-pretrained": ("attention",)},
    ),
    "pathfinder24": Entry(
        "Pathfinder, 24 x 24 = 576 tokens, small models",
        "lra:pathfinder24,scale=small",
        ("s5", "s4d", "attention"),
        variants=SCRATCH_OR_NOT,
        only={"self-pretrained": ("attention",)},
    ),
    "listops_small": Entry(
        "ListOps, 20 to 100 tokens, small models",
        "lra:listops,scale=small",
        ("s5", "attention"),
        variants=SCRATCH_OR_NOT,
    ),
    "lra_listops": Entry(
        "ListOps of the Long Range Arena, 500 to 2,000 tokens",
        "lra:listops,scale=paper",
        ("s5", "s4d"),
        machine=GPU,
        published={"s5": Published(0.6215, S5), "s4d": Published(0.6047, DFT)},
    ),
    "lra_image": Entry(
        "Image of the Long Range Arena, 1,024 tokens",
        "lra:image,scale=paper",
        ("s5", "s4d"),
        machine=GPU,
        published={"s5": Published(0.8800, S5), "s4d": Published(0.8819, DFT)},
    ),
    "lra_pathfinder": Entry(
        "Pathfinder of the Long Range Arena, 1,024 tokens, its own pictures",
        "lra:pathfinder32,scale=paper",
        ("s5", "s4d"),
        overrides={"data.path": "data/lra_release/pathfinder32"},
        machine=GPU,
        published={"s5": Published(0.9533, S5), "s4d": Published(0.9306, DFT)},
    ),
    "scifar": Entry(
        "sequential CIFAR-10, 1,024 tokens",
        "pixels:scifar,scale=paper",
        ("s4",),
        machine=GPU,
        published={"s4": Published(0.9180, DFT)},
    ),
    "pathx": Entry(
        "Path-X of the Long Range Arena, 16,384 tokens, its own pictures",
        "lra:pathx,scale=paper",
        ("s5", "s4d"),
        overrides={"data.path": "data/lra_release/pathfinder128"},
        machine=GPU,
        published={"s5": Published(0.9858, S5), "s4d": Published(0.9195, DFT)},
    ),
}
