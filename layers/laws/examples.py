"""Every layer at a small size, for what examines them all: laws, rounding, tests."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn

from layers import contract, facts
from layers.models.build import FRAME_LAYERS, LAYERS


def cases(name: str, cls: type[nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    """The `EXAMPLES` of a layer's class, or its defaults: `name` and variant -> what
    makes the layer. `ValueError` for fields that the class does not have."""
    given = dict(features=facts.FEATURES)
    if "size" in {field.name for field in dataclasses.fields(cls)}:
        given["size"] = facts.SIZE
    for fields in facts.examples_of(cls).values():
        contract.check_fields("EXAMPLES", name, cls, {**given, **fields}, given)
    return {
        f"{name} {variant}".rstrip(): functools.partial(cls, **given, **fields)
        for variant, fields in facts.examples_of(cls).items()
    }


# Every layer of LAYERS and FRAME_LAYERS, and the variants whose code path differs.
CASES = {
    case: make
    for name, cls in (LAYERS | FRAME_LAYERS).items()
    for case, make in cases(name, cls).items()
}
