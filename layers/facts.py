"""What a mixer's class says of itself, without annotation, so that no table does.

    REFUSES     which of `mask`, `reset`, `dt` and `state` it cannot take; a property
                where that depends on a field, inherited; of a block, a stack and a
                model what any of their mixers cannot
    SEQUENTIAL  why its length cannot be split over devices; "" where it can
    PLACEMENT   how it stands in a block; `DEFAULT_PLACEMENT` where it has none
    EXAMPLES    variant -> its fields at a small size, for the laws and the tests; ""
                is the plain one, and `features` and `size` are given

A subclass does not inherit the last two: what it adds may want another place.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn

# Of the examples: mixers whose filters have a length take it from L.
L = 15  # tokens of a call: odd, thirds are too, no power of two
FEATURES = 6
SIZE = (2, 3)  # of the frames of a layer over images


class Placement(NamedTuple):
    """How a mixer is placed in its block, as in its paper and its public code.

    Attributes:
        gate: behind it, a key of `layers.models.block.GATES`.
        mlp: hidden width of a gated MLP per feature; 0 for none. Every MLP is gated,
            where RetNet, H3 and Hyena have plain ones.
        gelu: the form in the gate, a key of `layers.models.block.GELUS`.
        norm_epsilon: of the block's norms; 0 for the norm's own value.
    """

    gate: str
    mlp: float
    gelu: str = "tanh"
    norm_epsilon: float = 0.0


REFUSABLE = ("mask", "reset", "dt", "state")
DEFAULT_PLACEMENT = Placement("glu", 0.0)
S4_BLOCK = Placement("glu", 0.0, "erf", 1e-5)


def examples(plain: Mapping, /, **variants: Mapping) -> Mapping[str, Mapping]:
    """EXAMPLES: the fields of the plain one, and of its variants by their names. (A
    dict does as well, but what all instances share is better not changed.)"""
    return MappingProxyType({"": plain, **variants})


# The REFUSES of what convolves where it reads both directions, and only there.
DT_BOTH_WAYS = property(lambda layer: ("dt",) if layer.bidirectional else ())


def placement_of(cls: type[nn.Module]) -> Placement:
    """Of the class of a mixer."""
    return vars(cls).get("PLACEMENT", DEFAULT_PLACEMENT)


def examples_of(cls: type[nn.Module]) -> Mapping[str, Mapping]:
    """Variant -> fields of the class of a mixer."""
    return vars(cls).get("EXAMPLES", {"": {}})


def refusals(layer: nn.Module) -> frozenset[str]:
    """What a layer, or a model of layers, declares to refuse: its `REFUSES`, and the
    state where it has a field `bidirectional` that is True.

    `ValueError` for a `REFUSES` that is no tuple of names among mask, reset, dt, state.
    """
    declared = getattr(layer, "REFUSES", ())
    unknown = [name for name in declared if name not in REFUSABLE]
    if isinstance(declared, str) or unknown:
        raise ValueError(
            f"REFUSES: must be a tuple of names among {', '.join(REFUSABLE)}, got "
            f"{declared!r}"
        )
    state = ("state",) if getattr(layer, "bidirectional", False) else ()
    return frozenset((*declared, *state))


def has_state(layer: nn.Module) -> bool:
    """Whether a layer, or a model of layers, has a recurrent mode: only where it does
    not declare the contrary may `init_state` be called, and what it raises then is a
    fault of the layer."""
    return "state" not in refusals(layer)


def why_no_state(layer: nn.Module) -> str:
    """Why a layer, or a model, that declares to have no state has none, as its
    `init_state` says, whatever it raises."""
    try:
        layer.init_state(1)
    except Exception as reason:
        if str(reason):
            return str(reason)
    return f"REFUSES: {type(layer).__name__} declares that it has no recurrent mode"


NONLINEAR = (
    "a step is not linear in the state, so that no part of a sequence can be computed "
    "before the state that enters it"
)


def why_sequential(layer: nn.Module) -> str:
    """Why its length cannot be split over devices; "" where it can."""
    return getattr(layer, "SEQUENTIAL", "")
