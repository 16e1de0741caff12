"""A stack of blocks: whole repetitions of a pattern in `nn.scan`, the rest unrolled."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.diagonal import CONSTANTS
from layers.facts import refusals
from layers.inside import EXPOSED, MOVED, RECORD

COLLECTIONS = (
    "params",
    "batch_stats",
    "buffers",
    CONSTANTS,
    EXPOSED,
    MOVED,
    RECORD,
)
policies = jax.checkpoint_policies
# A loop over time is not run again where its backward pass needs only what is named so.
LOOPS = policies.save_only_these_names("chunks", "selective_scan")
# What the backward pass finds of a block that is recomputed in it, from little memory
# to much.
KEEPS = {
    "nothing": policies.nothing_saveable,
    "loops": LOOPS,
    "dots": policies.save_from_both_policies(
        LOOPS, policies.dots_with_no_batch_dims_saveable
    ),
}
TRAIN = 4  # position of `train` in __call__, counting self: static under nn.remat


class Repetition(nn.Module):
    """One pass over the pattern, the body of the scan."""

    pattern: tuple[Callable[[], nn.Module], ...]
    keeps: str | None = None

    @nn.compact
    def __call__(self, x, states, sequence, train):
        new = []
        for i, make in enumerate(self.pattern):
            block = _block(make, f"block_{i}", self.keeps)
            x, state = block(x, states[i], sequence, train)
            new.append(state)
        return x, tuple(new)


class Stack(nn.Module):
    """`depth` blocks that follow `pattern`, with one state per block.

    The compiled program holds one copy of the pattern whatever the depth: parameters
    and states of the repeated part carry a leading axis "layers".

    Attributes:
        pattern: makes the blocks of one repetition, in order.
        depth: number of blocks, not necessarily a multiple of the pattern.
        remat: recompute each block in the backward pass, but for what `keeps` says, a
            key of `KEEPS`.
    """

    pattern: tuple[Callable[[], nn.Module], ...]
    depth: int
    remat: bool = False
    keeps: str = "loops"

    @property
    def REFUSES(self) -> tuple[str, ...]:
        """What any of its mixers refuses."""
        return tuple(sorted(frozenset().union(*(refusals(m()) for m in self.pattern))))

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state {"repeated": .., "rest": ..}."""
        repeats, rest = divmod(self.depth, len(self.pattern))
        if state is None:
            state = {
                "repeated": (None,) * len(self.pattern),
                "rest": (None,) * rest,
            }
        new = {"repeated": (), "rest": ()}
        keeps = self.keeps if self.remat else None
        if repeats:
            scanned = nn.scan(
                Repetition,
                variable_axes=dict.fromkeys(COLLECTIONS, 0),
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, new["repeated"] = scanned(self.pattern, keeps, name="repeated")(
                x, state["repeated"], sequence, train
            )
        for i in range(rest):
            block = _block(self.pattern[i], f"rest_{i}", keeps)
            x, last = block(x, state["rest"][i], sequence, train)
            new["rest"] += (last,)
        return x, new

    @nn.nowrap
    def init_state(self, batch_size: int) -> dict:
        """Initial states; `ValueError` if any block has no recurrent mode."""
        repeats, rest = divmod(self.depth, len(self.pattern))
        states = [make().init_state(batch_size) for make in self.pattern]

        def stacked(leaf):
            return jnp.broadcast_to(leaf, (repeats, *leaf.shape))

        return {
            "repeated": jax.tree.map(stacked, tuple(states)) if repeats else (),
            "rest": tuple(states[:rest]),
        }


def _block(make, name, keeps):
    """A block, recomputed in the backward pass unless `keeps` is None."""
    if keeps is None:
        return make(name=name)
    block = make.func
    rematerialised = nn.remat(
        block, prevent_cse=False, static_argnums=(TRAIN,), policy=KEEPS[keeps]
    )
    return rematerialised(*make.args, **make.keywords, name=name)
