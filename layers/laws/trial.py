"""A layer with parameters, an input and a state, and the calls that laws compare."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.check.comparison import QUICK_TO_COMPILE
from kernels.tolerance import error, limit
from layers.facts import L, refusals
from ssm.sequence import Sequence

B = 3  # rows of the examined calls


class NotApplicable(Exception):
    """Raised by a law that says nothing about this layer; the message says why."""


class Broken(Exception):
    """Raised by a law that is broken in a way that no error measures."""


class Result(NamedTuple):
    """What a call returns."""

    output: Any
    state: Any


class Gradients(NamedTuple):
    parameters: Any
    input: Any
    state: Any


class Equal(NamedTuple):
    """Two trees that a law demands to be equal within `kernels.tolerance`."""

    what: str
    actual: Any
    expected: Any
    kind: str = "value"
    dtype: str = "float32"


class Remark(NamedTuple):
    """What else there is to say of a finding, such as that it was tried on less."""

    text: str


class Worst(NamedTuple):
    error: float
    limit: float
    where: str


def jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` for results that are used once: what counts is the time to compile."""
    quick = QUICK_TO_COMPILE if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


def worst(actual: Any, expected: Any) -> float:
    """The largest leaf error of two trees (see `kernels.tolerance.error`)."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max((error(a, e) for a, e in pairs), default=0.0)


def measured(equal: Equal) -> Worst:
    """The largest error of the leaves, and where it is."""
    bound = limit(equal.dtype, equal.kind)
    actual, structure = jax.tree_util.tree_flatten_with_path(equal.actual)
    expected, target_structure = jax.tree.flatten(equal.expected)
    if structure != target_structure:
        raise Broken(
            f"{equal.what}: the structure is {structure}, not {target_structure}"
        )
    largest = Worst(0.0, bound, equal.what)
    for (path, leaf), target in zip(actual, expected, strict=True):
        size = error(leaf, target)
        if size > largest.error:
            place = f"{equal.what}: {_place(path, leaf, target)}"
            largest = Worst(size, bound, place)
    return largest


def _place(path, leaf, target):
    name = jax.tree_util.keystr(path).lstrip(".")
    leaf, target = np.asarray(leaf), np.asarray(target)
    if leaf.shape != target.shape:
        return f"{name} has shape {leaf.shape}, not {target.shape}"
    off = np.abs(leaf.astype(complex) - target.astype(complex))
    index = np.unravel_index(
        np.argmax(np.where(np.isfinite(off), off, np.inf)), shape=off.shape
    )
    kind = "" if np.isfinite(leaf[index]) else " is not finite"
    if name.startswith(("output", "input")) and leaf.ndim > 1:
        return f"{name}{kind}, row {index[0]}, token {index[1]}"
    if name.startswith("state") and leaf.ndim:
        return f"{name}{kind}, row {index[0]}"
    return f"{name}{kind}, entry {[int(i) for i in index]}" if index else name + kind


def at(values: jax.Array, places: jax.Array) -> jax.Array:
    """values [B, L, ...] at places [B, M] of every row: [B, M, ...]."""
    return values[jnp.arange(len(places))[:, None], places]


def moves(leaf: jax.Array) -> bool:
    """Whether a leaf has a gradient: counts and flags have none."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


class Trial:
    """A layer with parameters, an input and a random state to examine it on.

    Every program takes a while to compile: the laws share calls of few shapes, those of
    `length` tokens, of `piece`, a third of it, and of one.
    """

    def __init__(self, layer, length=L, seed=0):
        if length % 3 or length < 12:
            raise ValueError(
                f"length: must be a multiple of 3 and at least 12, got {length}"
            )
        self.layer, self.length, self.piece = layer, length, length // 3
        self.refuses = refusals(layer)
        self.compiled = {}  # call -> its compiled gradients, which several laws share
        x_key, init_key, self.key, self._state_key = jax.random.split(
            jax.random.key(seed), 4
        )
        token = *getattr(layer, "size", ()), layer.features
        self.x = jax.random.normal(x_key, (B, length, *token))
        self.variables = nn.unbox(jit(layer.init)({"params": init_key}, self.x))
        self.apply = jit(self.plain)

    def plain(
        self,
        variables: Any,
        x: Any,
        state: Any | None = None,
        sequence: Any | None = None,
    ) -> Any:
        """A call that is not compiled."""
        return Result(*self.layer.apply(variables, x, state, sequence))

    def __call__(self, x, state=None, sequence=None):
        return self.apply(self.variables, x, state, sequence)

    @functools.cached_property
    def state(self) -> Any:
        """A random state; None where the layer declares that it has none."""
        if "state" in self.refuses:
            return None
        return _random_like(self._state_key, self(self.x[:, : self.piece]).state)

    def initial(self) -> Any:
        """The state before the first token; None where there is none."""
        return None if "state" in self.refuses else self.layer.init_state(B)

    def takes(self, *fields: str) -> bool:
        return self.refuses.isdisjoint(fields)

    def needs(self, *fields: str) -> None:
        """Ends a law about what the layer declares to refuse."""
        for field in fields:
            if field in self.refuses:
                raise NotApplicable(f"declared: refuses {field}")

    def dt(self) -> Any:
        """Random elapsed times [B, L]."""
        return jax.random.uniform(self.key, (B, self.length), minval=0.2, maxval=3.0)

    def everything(self) -> Any:
        """All that the layer takes besides tokens, different in every row."""
        draw = np.random.default_rng(1)
        mask = draw.random((B, self.length)) < 0.7
        reset = draw.random((B, self.length)) < 0.25
        return Sequence(
            jnp.asarray(mask) if self.takes("mask") else None,
            jnp.asarray(reset) if self.takes("reset") else None,
            self.dt() if self.takes("dt") else None,
        )

    def in_pieces(
        self, sizes: Any, x: Any, state: Any, sequence: Any | None = None
    ) -> Any:
        """The outputs and final state of consecutive calls of the given lengths."""
        outputs, start = [], 0
        for size in sizes:
            piece = slice(start, start + size)
            part = jax.tree.map(lambda field, p=piece: field[:, p], sequence)
            y, state = self(x[:, piece], state, part)
            outputs.append(y)
            start += size
        return Result(jnp.concatenate(outputs, axis=1), state)

    def tokens(self) -> Any:
        """Every token as a sequence of its own, [B L, 1, ...]."""
        return self(self.x.reshape(-1, 1, *self.x.shape[2:]))

    def gradients(
        self, call: Callable, x: Any, state: Any, *extra: Any, ends: Any = 1.0
    ) -> Any:
        """The result of call(variables, x, state, *extra) and the gradients of a
        contraction of it, the final state weighted by `ends`, with respect to the
        parameters, the input and the initial state."""
        leaves, structure = jax.tree.flatten(state)

        def contracted(variables, x, moving, fixed, ends, extra):
            state = [f if m is None else m for f, m in zip(fixed, moving, strict=True)]
            state = jax.tree.unflatten(structure, state)
            result = Result(*call(variables, x, state, *extra))
            last = jax.tree.leaves(result.state)
            total = _contraction(0, result.output)
            total += ends * sum(_contraction(i, leaf) for i, leaf in enumerate(last, 1))
            return total, result

        moving = [leaf if moves(leaf) else None for leaf in leaves]
        fixed = [None if moves(leaf) else leaf for leaf in leaves]
        compiled = self.compiled.setdefault(
            (call, structure), jit(jax.grad(contracted, (0, 1, 2), has_aux=True))
        )
        grads, result = compiled(self.variables, x, moving, fixed, ends, extra)
        return result, Gradients(*grads)

    # Calls for `gradients`.

    def whole(self, variables: Any, x: Any, state: Any) -> Any:
        """One call on everything, in train mode."""
        return self.layer.apply(variables, x, state, None, True)

    def padded(self, variables: Any, x: Any, state: Any, mask: Any, places: Any) -> Any:
        """The output at the places [B, M] that exist, in train mode."""
        y, state = self.layer.apply(variables, x, state, Sequence(mask=mask), True)
        return at(y, places), state

    def scanned(self, variables: Any, x: Any, state: Any, dt: Any | None = None) -> Any:
        """Consecutive calls of a third each in a `jax.lax.scan`."""

        def call(state, parts):
            x, dt = parts
            sequence = None if dt is None else Sequence(dt=dt)
            y, state = self.layer.apply(variables, x, state, sequence)
            return state, y

        def split(z):
            return jnp.moveaxis(z.reshape(len(z), 3, -1, *z.shape[2:]), 1, 0)

        state, y = jax.lax.scan(call, state, jax.tree.map(split, (x, dt)))
        return jnp.moveaxis(y, 0, 1).reshape(x.shape), state


def _contraction(i, leaf):
    """A sum of the entries of a leaf with weights that differ from leaf to leaf."""
    if not moves(leaf):
        return 0.0
    wave = np.cos(1.7 * np.arange(leaf.size) + i).reshape(leaf.shape)
    wave = wave.astype(np.float32)
    total = jnp.sum(leaf.real * wave)
    if jnp.iscomplexobj(leaf):
        total += jnp.sum(leaf.imag * wave[::-1])
    return total


def _random_like(key, tree):
    """A state with normal entries (complex ones in both parts); counts and flags stay
    as they are."""

    def draw(key, leaf):
        if jnp.iscomplexobj(leaf):
            parts = jax.random.normal(key, (2, *leaf.shape))
            return jax.lax.complex(parts[0], parts[1])
        if not moves(leaf):
            return leaf
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, map(draw, keys, leaves))
