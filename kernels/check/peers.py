"""The same work by the best other package, compiled ahead of time in the same way.

What a program holds in temporaries it writes to memory and reads again, so that these
bytes are half of a comparison that needs no device. The figures of other packages were
measured once, outside this repository; ours are rows of size "peer" in a target's file.
"""

from dataclasses import dataclass

TARGET = "gpu:h200"
DTYPE, LENGTH = "bfloat16", 4096


@dataclass(frozen=True)
class Work:
    """Some work and what it takes another package.

    Attributes:
        op, variant, sizes: of ours, as in `cases`.
        package: its name and version.
        forward, gradient: MiB of temporaries, without and with all gradients.
    """

    op: str
    variant: str
    sizes: dict[str, int]
    package: str
    forward: int
    gradient: int


_HEADS = {"B": 4, "H": 16, "G": 16, "K": 128, "V": 128}
_JLA = "jax-linear-attention 0.1.0"

# Its kernels for Hopper (Mosaic GPU) with Python 3.12 and jax 0.11.2.
WORK = (
    Work("chunked_scan", "scalar decay", _HEADS, _JLA, 1, 321),
    Work("chunked_scan", "delta rule, scalar decay", _HEADS, _JLA, 34, 354),
    Work("chunked_scan", "delta rule, vector decay", _HEADS, _JLA, 371, 1075),
    Work("selective_scan", "no skip", {"B": 4, "D": 2048, "N": 16}, _JLA, 3, 165),
)


def sizes(op: str, variant: str) -> dict[str, int]:
    """Of the work of an operation's variant."""
    (work,) = (w for w in WORK if (w.op, w.variant) == (op, variant))
    return work.sizes
