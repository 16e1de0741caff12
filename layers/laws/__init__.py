"""The laws that every layer obeys, as a library and a command.

    python -m layers.laws --layer s5
    python -m layers.laws --layer my_package.my_module.MyLayer
    python -m layers.laws --all

`examine(layer)` runs them on any module of the contract, a user's own included, and
returns one `Finding` per law: its error, its limit and where the error is, what broke
it, or why it does not apply.

A layer that cannot take a mask, a reset or elapsed times, or that has no state because
it reads the future, raises a `ValueError` that names the argument, and declares it in
one attribute of its class (without annotation, which would make it a field):

    class MyLayer(nn.Module):
        REFUSES = ("dt", "reset")  # among mask, reset, dt, state

A field `bidirectional` that is True declares the absence of a state. What is declared
must be refused, and any other refusal is a broken law.
"""

import functools
import math
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import shards
from kernels.tolerance import error, limit
from layers import contract, facts
from layers.facts import L
from layers.laws.trial import (
    B,
    Broken,
    Equal,
    NotApplicable,
    Remark,
    Result,
    Trial,
    at,
    jit,
    measured,
    moves,
    worst,
)
from ssm.sequence import Sequence

__all__ = ["LAWS", "Finding", "Trial", "examine", "worst"]


class Finding(NamedTuple):
    """What one law found: the largest `error` relative to its `limit`, and `where`; or
    the `reason` why it is broken without one, or says nothing."""

    law: str
    error: float | None
    limit: float | None
    reason: str = ""
    where: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.limit


# A law yields what must be equal, and remarks.
Yields = Iterator[Equal | Remark]


def modes(trial: Trial) -> Yields:
    """One call equals pieces equals single tokens: outputs and final state."""
    trial.needs("state")
    one_call = trial(trial.x, trial.state)
    p = trial.piece
    sizes = [p, 1, p, *[1] * (trial.length - 2 * p - 1)]
    ones = [1] * trial.length
    yield Equal("pieces", trial.in_pieces(sizes, trial.x, trial.state), one_call)
    yield Equal("single tokens", trial.in_pieces(ones, trial.x, trial.state), one_call)
    yield Equal(
        "no state and a fresh one", trial(trial.x), trial(trial.x, trial.initial())
    )


def mode_gradients(trial: Trial) -> Yields:
    """Without a state and with a fresh one the gradients are the same; those through
    pieces are the law of `lax.scan`."""
    trial.needs("state")
    _, fresh = trial.gradients(trial.whole, trial.x, None)
    _, started = trial.gradients(trial.whole, trial.x, trial.initial())
    yield Equal("no state", fresh[:2], started[:2], "gradient")


def causality(trial: Trial) -> Yields:
    """Later inputs do not change earlier outputs."""
    trial.needs("state")
    t = trial.length // 2
    changed = trial.x.at[:, t:].add(1.0)
    actual, expected = trial(changed), trial(trial.x)
    yield Equal(
        f"tokens from {t} on changed",
        Result(actual.output[:, :t], None),
        Result(expected.output[:, :t], None),
    )


PADDINGS = {
    "left": lambda real, total: np.arange(total) >= total - real,
    "right": lambda real, total: np.arange(total) < real,
    "inside": lambda real, total: np.isin(
        np.arange(total), np.linspace(0, total - 1, real).astype(int)
    ),
}
EXTRA = 4  # masked tokens


def _paddings(trial):
    """x with NaN in masked places, its mask and the real places [B, L], three times:
    the rows are padded in three ways, by turns."""
    total = trial.length + EXTRA
    for turn in range(B):
        ways = [list(PADDINGS.values())[(row + turn) % 3] for row in range(B)]
        keep = np.stack([way(trial.length, total) for way in ways])
        places = np.stack([np.flatnonzero(row) for row in keep])
        x = jnp.full((B, total, *trial.x.shape[2:]), jnp.nan)
        x = x.at[np.arange(B)[:, None], places].set(trial.x)
        yield x, jnp.asarray(keep), jnp.asarray(places)


def _hidden_is_zero(subject, values, mask):
    real = np.asarray(mask).reshape(*mask.shape, *[1] * (values.ndim - 2))
    nonzero = np.argwhere(np.where(real, 0, np.asarray(values)) != 0)
    if len(nonzero):
        row, token = nonzero[0][:2]
        raise Broken(f"{subject} is not 0 at a masked token: row {row}, token {token}")


def padding(trial: Trial) -> Yields:
    """Masked tokens, even NaN, change nothing, left, right and inside: outputs and
    final state; their outputs are exactly 0."""
    trial.needs("mask")
    for x, mask, places in _paddings(trial):
        for state in [None] if trial.state is None else [None, trial.state]:
            y, final = trial(x, state, Sequence(mask=mask))
            _hidden_is_zero("the output", y, mask)
            actual = Result(at(y, places), final)
            yield Equal("NaN in masked tokens", actual, trial(trial.x, state))


def padding_gradients(trial: Trial) -> Yields:
    """Gradients ignore masked tokens (in train mode)."""
    trial.needs("mask")
    _, expected = trial.gradients(trial.whole, trial.x, trial.state)
    for x, mask, places in _paddings(trial):
        _, actual = trial.gradients(trial.padded, x, trial.state, mask, places)
        _hidden_is_zero("the gradient", actual.input, mask)
        actual = actual._replace(input=at(actual.input, places))
        yield Equal("NaN in masked tokens", actual, expected, "gradient")


def _documents(trial):
    """Two documents of `piece` tokens in every row, all other tokens alone: their
    starts [B, 2] and the resets [B, L]."""
    p, last = trial.piece, trial.length - trial.piece
    starts = np.asarray([[0, p], [p // 2, last - 1], [1, last]])
    reset = np.ones((B, trial.length), bool)
    for row, pair in enumerate(starts):
        for start in pair:
            reset[row, start + 1 : start + p] = False
    return starts, jnp.asarray(reset)


def packing(trial: Trial) -> Yields:
    """Documents packed with resets, in every row its own, equal separate calls: outputs
    and final state."""
    trial.needs("reset")
    starts, reset = _documents(trial)
    alone = trial.tokens()
    output = alone.output.reshape(trial.x.shape)
    ends = jnp.arange(1, B + 1) * trial.length - 1
    final = jax.tree.map(lambda s: s[ends], alone.state)
    rows = np.arange(B)[:, None]
    for start in starts.T:
        places = start[:, None] + np.arange(trial.piece)
        document = trial(at(trial.x, places))
        output = output.at[rows, places].set(document.output)
        at_end = start + trial.piece == trial.length
        final = jax.tree.map(
            lambda old, new, rows=at_end: jnp.where(_along(rows, old), new, old),
            final,
            document.state,
        )
    actual = trial(trial.x, trial.state, Sequence(reset=reset))
    yield Equal("documents", actual, Result(output, final))


def _along(rows, leaf):
    """Flags [B] that broadcast against a leaf [B, ...]."""
    return jnp.asarray(rows).reshape(-1, *[1] * (leaf.ndim - 1))


def packing_gradients(trial: Trial) -> Yields:
    """No gradient crosses a reset: it is the sum of the gradients of what is before and
    what is behind it, each alone."""
    trial.needs("reset", "mask")
    cuts = np.asarray([trial.piece, trial.length // 2, trial.length // 4])[:, None]
    reset = jnp.asarray(np.arange(trial.length) == cuts)

    def packed(variables, x, state, reset):
        return trial.layer.apply(variables, x, state, Sequence(reset=reset), True)

    _, actual = trial.gradients(packed, trial.x, trial.state, reset)
    # In the shapes of the law of padding, which is compiled already.
    position = np.arange(trial.length + EXTRA)
    before, behind = position < cuts, (position >= cuts) & (position < trial.length)
    x = jnp.pad(trial.x, [(0, 0), (0, EXTRA)] + [(0, 0)] * (trial.x.ndim - 2))
    places = jnp.asarray(np.tile(np.arange(trial.length), (B, 1)))

    def alone(state, mask, ends):
        mask = jnp.asarray(mask)
        return trial.gradients(trial.padded, x, state, mask, places, ends=ends)[1]

    first, second = alone(trial.state, before, 0.0), alone(trial.initial(), behind, 1.0)
    expected = jax.tree.map(jnp.add, first[:2], second[:2])
    expected = first._replace(
        parameters=expected[0], input=expected[1][:, : trial.length]
    )
    yield Equal("one reset a row", actual, expected, "gradient")


def masked_reset(trial: Trial) -> Yields:
    """A reset on a masked token applies to the next real one, in this call or later."""
    trial.needs("reset", "mask")
    p = trial.piece
    first = np.asarray([0, 1, 0])
    second = first + p + np.asarray([2, 1, p - 1])
    rows, run = np.arange(B)[:, None], np.arange(p)
    ahead, behind = (start[:, None] + run for start in (first, second))
    mask, reset = np.zeros((2, B, trial.length), bool)
    mask[rows, ahead] = mask[rows, behind] = True
    reset[rows, second[:, None] - 1] = reset[:, -1] = True
    sequence = Sequence(mask=jnp.asarray(mask), reset=jnp.asarray(reset))
    y, final = trial(trial.x, trial.state, sequence)
    actual = jnp.concatenate([at(y, ahead), at(y, behind)], axis=1)
    expected = [
        trial(at(trial.x, ahead), trial.state).output,
        trial(at(trial.x, behind)).output,
    ]
    yield Equal(
        "documents",
        Result(actual, final),
        Result(jnp.concatenate(expected, axis=1), trial.initial()),
    )


def every_reset(trial: Trial) -> Yields:
    """With a reset at every token, each token is alone."""
    trial.needs("reset")
    reset = jnp.ones((B, trial.length), bool)
    together = trial(trial.x, trial.state, Sequence(reset=reset)).output
    alone = trial.tokens().output.reshape(together.shape)
    yield Equal("all tokens", Result(together, None), Result(alone, None))


def isolation(trial: Trial) -> Yields:
    """NaN before a reset, in tokens or in the state, does not get behind it."""
    trial.needs("reset")
    cuts = np.asarray([2, trial.length // 2, trial.length - 1])[:, None]
    reset = Sequence(reset=jnp.asarray(np.arange(trial.length) == cuts))
    before = jnp.asarray(np.arange(trial.length) < cuts)

    def behind(x, state):
        y, final = trial(x, state, reset)
        return Result(jnp.where(_beside(before, y), 0, y), final)

    expected = behind(trial.x, trial.state)
    x = jnp.where(_beside(before, trial.x), jnp.nan, trial.x)
    yield Equal("NaN in tokens", behind(x, trial.state), expected)
    if trial.state is not None:
        poisoned = jax.tree.map(
            lambda s: jnp.full_like(s, jnp.nan) if moves(s) else s, trial.state
        )
        yield Equal("NaN in the state", behind(trial.x, poisoned), expected)


def _beside(flags, values):
    """Flags [B, L] that broadcast against values [B, L, ...]."""
    return flags.reshape(*flags.shape, *[1] * (values.ndim - 2))


def rows(trial: Trial) -> Yields:
    """Every row, with a mask, resets, elapsed times and a state of its own, is what it
    is alone."""
    sequence = trial.everything()
    together = trial(trial.x, trial.state, sequence)
    for row in range(B):
        take_row = functools.partial(jax.tree.map, lambda leaf, r=row: leaf[r : r + 1])
        alone = trial(take_row(trial.x), take_row(trial.state), take_row(sequence))
        yield Equal(f"row {row} alone", alone, take_row(together))


def elapsed_time(trial: Trial) -> Yields:
    """dt = 1 equals no dt, another dt changes every row; with random dt one call equals
    single tokens, masks and resets included."""
    trial.needs("dt")
    dt = trial.dt()
    one_call = trial(trial.x, trial.state, Sequence(dt=dt))
    plain = trial(trial.x, trial.state)
    for row in range(B):
        if error(one_call.output[row], plain.output[row]) <= limit("float32"):
            raise Broken(f"dt changes nothing in row {row}")
    ones = trial(trial.x, trial.state, Sequence(dt=jnp.ones_like(dt)))
    yield Equal("dt = 1", ones, plain)
    if trial.state is None:  # it reads the future: nothing to feed token by token
        return
    tokens = [1] * trial.length
    plainly = Sequence(
        jnp.ones(dt.shape, bool) if trial.takes("mask") else None,
        jnp.zeros(dt.shape, bool) if trial.takes("reset") else None,
        dt,
    )
    yield Equal(
        "single tokens",
        trial.in_pieces(tokens, trial.x, trial.state, plainly),
        one_call,
    )
    sequence = trial.everything()
    yield Equal(
        "single tokens with masks and resets",
        trial.in_pieces(tokens, trial.x, trial.state, sequence),
        trial(trial.x, trial.state, sequence),
    )


def elapsed_gradients(trial: Trial) -> Yields:
    """Gradients with random dt agree between one call and pieces, d/d dt included."""
    trial.needs("dt", "state")

    def whole(variables, x_dt, state):
        x, dt = x_dt
        return trial.layer.apply(variables, x, state, Sequence(dt=dt))

    def pieces(variables, x_dt, state):
        return trial.scanned(variables, x_dt[0], state, x_dt[1])

    x_dt = trial.x, trial.dt()
    _, actual = trial.gradients(pieces, x_dt, trial.state)
    _, expected = trial.gradients(whole, x_dt, trial.state)
    if not jnp.any(expected.input[1]):
        raise Broken("no gradient reaches dt")
    yield Equal("pieces", actual, expected, "gradient")


def low_precision(trial: Trial) -> Yields:
    """In bfloat16 the output is bfloat16 and near float32; states stay float32."""
    low = trial.layer.clone(dtype=jnp.bfloat16)
    x = trial.x.astype(jnp.bfloat16)
    y, state = jit(low.apply)(trial.variables, x)
    if y.dtype != jnp.bfloat16:
        raise Broken(f"the output is {y.dtype}, not bfloat16")
    for leaf in jax.tree.leaves(state):
        if leaf.dtype not in (jnp.float32, jnp.complex64, jnp.int32, jnp.bool_):
            raise Broken(f"the state is {leaf.dtype}, not float32")
    expected = trial(x.astype(jnp.float32)).output
    actual, expected = (
        Result(part.astype(jnp.float32), None) for part in (y, expected)
    )
    yield Equal("bfloat16", actual, expected, dtype="bfloat16")


def batch_equivariance(trial: Trial) -> Yields:
    """Examples do not see each other, be they NaN, and their order does not matter."""
    order = jnp.asarray([2, 0, 1])
    together = trial(trial.x, trial.state)
    state = jax.tree.map(lambda s: s[order], trial.state)
    poisoned = trial(trial.x.at[0].set(jnp.nan), trial.state)
    yield Equal(
        "another order",
        trial(trial.x[order], state),
        jax.tree.map(lambda leaf: leaf[order], together),
    )
    yield Equal(
        "beside a row of NaN",
        *(jax.tree.map(lambda leaf: leaf[1:], z) for z in (poisoned, together)),
    )


def _mesh():
    devices = np.asarray(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


SPREAD = PartitionSpec("data")


def _copies(tree, count):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * count), tree)


def sharding(trial: Trial) -> Yields:
    """A batch spread over devices gives what one device gives."""
    mesh = _mesh()
    if mesh.size == 1:
        raise NotApplicable("one device; emulate more to examine it")
    expected = _copies(trial(trial.x, trial.state), mesh.size)
    x, state = _copies((trial.x, trial.state), mesh.size)
    actual = trial(*jax.device_put((x, state), NamedSharding(mesh, SPREAD)))
    yield Equal(f"{mesh.size} devices", actual, expected)


def shard_map(trial: Trial) -> Yields:
    """In `jax.shard_map` with its default check, the batch spread over the devices that
    there are: values and gradients of a call, without a state and with one, and values
    of a single token."""
    mesh = _mesh()

    def spread(variables, x, state):
        call = jax.shard_map(
            trial.plain,
            mesh=mesh,
            in_specs=(PartitionSpec(), SPREAD, SPREAD),
            out_specs=SPREAD,
        )
        result = call(variables, *_copies((x, state), mesh.size))

        def mean(leaf):
            copies = leaf.reshape(mesh.size, B, *leaf.shape[1:])
            return copies.mean(axis=0) if moves(leaf) else copies[0]

        return jax.tree.map(mean, result)

    # The expected ones with a state are compiled for other laws anyway.
    for state in [None] if trial.state is None else [None, trial.state]:
        name = "a call" if state is None else "a call with a state"
        result, gradients = trial.gradients(spread, trial.x, state)
        expected_result, expected = trial.gradients(trial.whole, trial.x, state)
        yield Equal(name, result, expected_result)
        yield Equal(name, gradients, expected, "gradient")
    if trial.state is not None:
        token = trial.x[:, :1]
        step = jit(spread)(trial.variables, token, trial.state)
        yield Equal("a token", step, trial(token, trial.state))


def sequence_axis(trial: Trial) -> Yields:
    """With its length spread over the devices that there are: values, the final state
    and gradients are those of one device, with all that the layer takes, and with
    tokens alone."""
    if reason := facts.why_sequential(trial.layer):
        raise NotApplicable(f"declared: {reason}")
    mesh = _mesh()
    if mesh.size == 1:
        raise NotApplicable("one device; emulate more to examine it")
    tokens = 3 * max(mesh.size, 4)
    long = Trial(_with_room(trial.layer, tokens), tokens)
    axis = mesh.axis_names
    by_time = NamedSharding(mesh, PartitionSpec(None, axis))

    def whole(variables, x, state, sequence):
        return long.layer.apply(variables, x, state, sequence, True)

    def spread(variables, x, state, sequence):
        with shards.over(mesh, time=axis):
            x = jax.lax.with_sharding_constraint(x, by_time)
            return whole(variables, x, state, sequence)

    for name, given in {
        "everything": (long.state, long.everything()),
        "tokens alone": (None, None),
    }.items():
        result, gradients = long.gradients(spread, long.x, *given)
        expected_result, expected = long.gradients(whole, long.x, *given)
        name = f"{mesh.size} devices, {name}"
        yield Equal(name, result, expected_result)
        yield Equal(name, gradients, expected, "gradient")


def compiled(trial: Trial) -> Yields:
    """Compiled or not, and however hard the compiler tries."""
    quickly = trial(trial.x)
    yield Equal("compiled", jax.jit(trial.plain)(trial.variables, trial.x), quickly)
    yield Equal("not compiled", trial.plain(trial.variables, trial.x), quickly)


def vmapped(trial: Trial) -> Yields:
    """`jax.vmap` over the rows gives what the batch gives."""
    over_rows = jit(jax.vmap(trial.plain, (None, 0, 0)))
    x, state = jax.tree.map(lambda leaf: leaf[:, None], (trial.x, trial.state))
    actual = jax.tree.map(lambda leaf: leaf[:, 0], over_rows(trial.variables, x, state))
    yield Equal("rows", actual, trial(trial.x, trial.state))


def rematerialised(trial: Trial) -> Yields:
    """`jax.checkpoint` changes neither values nor gradients."""
    remat = jax.checkpoint(trial.whole)
    result, gradients = trial.gradients(remat, trial.x, trial.state)
    expected_result, expected = trial.gradients(trial.whole, trial.x, trial.state)
    yield Equal("values", result, expected_result)
    yield Equal("gradients", gradients, expected, "gradient")


def scan_over_calls(trial: Trial) -> Yields:
    """A `jax.lax.scan` over calls, its state donated, equals one call: outputs, final
    state, and gradients through the pieces."""
    trial.needs("state")
    result, gradients = trial.gradients(trial.scanned, trial.x, trial.state)
    expected_result, expected = trial.gradients(trial.whole, trial.x, trial.state)
    yield Equal("values", result, expected_result)
    yield Equal("gradients", gradients, expected, "gradient")
    donating = jit(lambda *args: Result(*trial.scanned(*args)), donate_argnums=2)
    first = donating(trial.variables, trial.x, trial.initial())
    expected = trial(trial.x, trial.initial())
    yield Equal("a donated state", first, expected)
    expected = trial(trial.x, expected.state)
    second = donating(trial.variables, trial.x, first.state)
    yield Equal("a donated state, again", second, expected)


def in_x64(trial: Trial) -> Yields:
    """Under `jax.enable_x64` a float32 layer stays one: dtypes of parameters, outputs,
    states and gradients, and values, in a `jax.lax.scan` over calls where there is a
    state."""
    call = trial.whole if trial.state is None else trial.scanned
    narrow = jax.eval_shape(trial.initial)
    expected_result, expected = trial.gradients(call, trial.x, trial.state)
    with jax.enable_x64(True):
        parameters = jax.eval_shape(
            lambda key: nn.unbox(trial.layer.init({"params": key}, trial.x)), trial.key
        )
        _same_dtypes("parameters", parameters, trial.variables)
        _same_dtypes("the initial state", jax.eval_shape(trial.initial), narrow)
        result, gradients = trial.gradients(call, trial.x, trial.state)
        _same_dtypes("results", result, expected_result)
        _same_dtypes("gradients", gradients, expected)
    yield Equal("values", result, expected_result)
    yield Equal("gradients", gradients, expected, "gradient")


def _same_dtypes(subject, tree, expected):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), target in zip(leaves, jax.tree.leaves(expected), strict=True):
        if leaf.dtype != target.dtype:
            name = jax.tree_util.keystr(path)
            raise Broken(f"{subject}{name}: {leaf.dtype} instead of {target.dtype}")


LONG = 2**16
SECONDS = 2.5  # for a call, of which the law makes four
MEMORY = 2**30  # bytes of intermediate values
PROBES = 2**8, 2**11  # lengths from which time and memory are extrapolated
QUADRATIC = 1.5  # least power of the length with which such a cost grows between them
PATIENCE = 60  # seconds of a call of LONG that is thought to be linear


def length(trial: Trial) -> Yields:
    """A call of 2^16 tokens equals its halves, and the same in float64; a layer of
    quadratic cost is tried on as many as take ten seconds and a GiB."""
    tokens = _affordable(trial)
    if tokens < LONG:
        yield Remark(f"tried on {tokens} tokens: more cost too much time or memory")
    layer, x, variables = _enlarged(trial, tokens)
    what = f"{tokens} tokens"
    whole = jit(_calls(layer))(variables, x, None)
    if "state" not in trial.refuses:
        half = jit(_calls(layer))
        first = half(variables, x[:, : tokens // 2], layer.init_state(1))
        second = half(variables, x[:, tokens // 2 :], first.state)
        output = jnp.concatenate([first.output, second.output], axis=1)
        yield Equal(f"halves of {what}", Result(output, second.state), whole)
    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if moves(leaf) else leaf,
            (variables, x),
        )
        exact = jit(_calls(layer.clone(dtype=jnp.float64)))(*double, None)
        exact = jax.device_get(exact)
    # What remembers n tokens is n roundings of its decay away from exact: 2,000 where
    # it decays by exp(-0.5 dt) a token and dt is 1e-3, as S5 may start. Hence the
    # limits of gradients. What is lost with the distance shows in every token of a
    # block, while a norm enlarges the rounding of the one token among so many whose
    # features nearly vanish, wherever that stands.
    expected = _by_blocks(exact.output)
    difference = _by_blocks(np.asarray(whole.output, np.float64) - exact.output)
    blocks = f"{what} in float64, RMS of blocks"
    yield Equal(blocks, expected + difference, expected, "gradient")
    found, expected = Result(None, whole.state), Result(None, exact.state)
    yield Equal(f"{what} in float64", found, expected, "gradient")


def _by_blocks(output):
    """The root mean square of every 64th part of an output [1, L, ...]."""
    blocks = np.array_split(output[0], 64)
    return np.array([np.sqrt(np.mean(block**2)) for block in blocks])


def _enlarged(trial, tokens):
    """The layer with room for so many tokens, a call of them, and parameters."""
    layer = _with_room(trial.layer, tokens)
    x = jax.random.normal(trial.key, (1, tokens, *trial.x.shape[2:]))
    variables = jit(layer.init)({"params": trial.key}, x[:, :1])
    return layer, x, nn.unbox(variables)


def _with_room(layer, tokens):
    fields = [name for name in ("length", "context") if hasattr(layer, name)]
    return layer.clone(**{f: max(tokens, getattr(layer, f)) for f in fields})


def _calls(layer):
    return lambda variables, x, state: Result(*layer.apply(variables, x, state))


def _affordable(trial):
    """LONG; of a layer whose cost grows with the square of the length, as two short
    calls show, the largest power of two that needs no more than SECONDS and MEMORY."""
    costs = []
    for tokens in PROBES:
        layer, x, variables = _enlarged(trial, tokens)
        program = jit(_calls(layer)).lower(variables, x, None).compile()
        seconds = _seconds(program, variables, x)
        if seconds < 2:  # other work may have disturbed it
            seconds = min(seconds, *(_seconds(program, variables, x) for _ in range(4)))
        memory = program.memory_analysis()
        costs.append((seconds, memory.temp_size_in_bytes if memory else 0))
    return _most(*zip(*costs, strict=True))


def _most(seconds, memory):
    """The length that two costs, each at both PROBES, allow."""
    span, most = math.log2(PROBES[1] / PROBES[0]), LONG
    # A busy machine makes the first of two times too long, and so the power too low.
    limits = (seconds, SECONDS, PATIENCE), (memory, MEMORY, math.inf)
    for (low, high), budget, patience in limits:
        power = math.log2(high / low) / span if low and high else 0.0
        if power > QUADRATIC or high * LONG / PROBES[1] > patience:
            tokens = PROBES[1] * math.sqrt(budget / high)
            most = min(most, 2 ** int(math.log2(max(tokens, PROBES[0]))))
    return most


def _seconds(program, variables, x):
    start = time.perf_counter()
    jax.block_until_ready(program(variables, x, None))
    return time.perf_counter() - start


def bad_input(trial: Trial) -> Yields:
    """Wrong ranks, L = 0 and fields of a wrong shape are ValueErrors that name them."""
    x, ones = trial.x, jnp.ones((B, trial.length), bool)
    bad_calls = {
        "x": [(x[0], None), (x[:, :0], None), (x[..., :-1], None)],
        "mask": [
            (x, Sequence(mask=ones[:, 1:])),
            (x, Sequence(mask=ones[0])),
            (x, Sequence(mask=ones.astype(jnp.float32))),
        ],
        "reset": [(x, Sequence(reset=ones[1:]))],
        "dt": [(x, Sequence(dt=jnp.ones((B, trial.length + 1))))],
    }
    for name, calls in bad_calls.items():
        for x, sequence in calls:
            _must_refuse(trial, name, x, None, sequence)
    yield from ()


def _must_refuse(trial, name, x, state, sequence):
    try:
        jax.eval_shape(trial.plain, trial.variables, x, state, sequence)
    except ValueError as message:
        if not str(message).startswith(f"{name}:"):
            raise Broken(f"{name}: its refusal does not name it: {message}") from None
    else:
        raise Broken(f"{name}: accepted where it must be refused")


def declared_refusals(trial: Trial) -> Yields:
    """What `REFUSES` declares is refused by a ValueError that names it, and nothing
    else is; without a state there is none to ask for, with one it keeps its form."""
    ones = jnp.ones((B, trial.length))
    for name, value in {
        "mask": ones.astype(bool),
        "reset": ones.astype(bool),
        "dt": ones,
    }.items():
        sequence = Sequence(**{name: value})
        if name in trial.refuses:
            _must_refuse(trial, name, trial.x, None, sequence)
        else:
            jax.eval_shape(trial.plain, trial.variables, trial.x, None, sequence)
    _, final = jax.eval_shape(trial.plain, trial.variables, trial.x)
    if "state" not in trial.refuses:
        expected = jax.eval_shape(trial.initial)
        form = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
        if form(final) != form(expected):
            raise Broken(
                f"state: init_state makes {form(expected)}, a call {form(final)}"
            )
        return
    _must_refuse(trial, "state", trial.x, jnp.zeros((B, 1)), None)
    if final is not None:
        raise Broken("state: declared to be refused, but a call returns one")
    try:
        trial.layer.init_state(B)
    except ValueError:
        yield from ()
    else:
        raise Broken("state: declared to be refused, but init_state makes one")


LAWS: dict[str, Callable[[Trial], Yields]] = {
    "refusals": declared_refusals,
    "bad input": bad_input,
    "one call = pieces = steps": modes,
    "no state, gradients": mode_gradients,
    "causality": causality,
    "padding": padding,
    "padding, gradients": padding_gradients,
    "packing": packing,
    "packing, gradients": packing_gradients,
    "reset on a masked token": masked_reset,
    "reset everywhere": every_reset,
    "isolation": isolation,
    "rows": rows,
    "batch": batch_equivariance,
    "elapsed time": elapsed_time,
    "elapsed time, gradients": elapsed_gradients,
    "length": length,
    "bfloat16": low_precision,
    "x64": in_x64,
    "jit": compiled,
    "vmap": vmapped,
    "checkpoint": rematerialised,
    "lax.scan over calls": scan_over_calls,
    "shard_map": shard_map,
    "sharding": sharding,
    "sequence axis": sequence_axis,
}


# Those that end without a comparison: they fail by what they raise.
COMPARE_NOTHING = frozenset({"refusals", "bad input"})


def examine(
    layer: nn.Module,
    length: int = L,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> list[Finding]:
    """Every law (or those named in `only`) on one layer: a list of `Finding`.

    `layer` is a Linen module with the contract of a mixer (see `layers.contract`), over
    tokens [features] or, with a field `size`, over frames [h, w, features]; `length` is
    that of most calls, a multiple of 3. `ValueError` for a layer that lacks a part of
    the contract, another length, or a `REFUSES` of the layer with unknown names.
    """
    contract.check_class(type(layer))
    trial = Trial(layer, length, seed)
    contract.check_call(layer)
    return [_examine(trial, law) for law in (LAWS if only is None else only)]


def _examine(trial, law):
    largest, remarks = None, []
    try:
        for outcome in LAWS[law](trial):
            if isinstance(outcome, Remark):
                remarks.append(outcome.text)
                continue
            deviation = measured(outcome)
            if (
                largest is None
                or deviation.error / deviation.limit > largest.error / largest.limit
            ):
                largest = deviation
    except NotApplicable as reason:
        return Finding(law, None, None, str(reason))
    except Broken as reason:
        return Finding(law, math.inf, 0.0, str(reason), "", tuple(remarks))
    except Exception as problem:
        reason = _described(problem)
        return Finding(law, math.inf, 0.0, reason, "", tuple(remarks))
    if largest is None:
        reason = "" if law in COMPARE_NOTHING else "it has compared nothing"
        return Finding(law, math.inf if reason else 0.0, 0.0, reason)
    return Finding(law, largest.error, largest.limit, "", largest.where, tuple(remarks))


def _described(problem):
    """The error in one line, with the last place in the layer's code that raised it."""
    folder, text = Path(__file__).parent, " ".join(str(problem).split())
    library = ("site-packages", "dist-packages")
    frames = [
        frame
        for frame in traceback.extract_tb(problem.__traceback__)
        if not any(part in frame.filename for part in library)
        and Path(frame.filename).parent != folder
    ]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(problem).__name__}: {textwrap.shorten(text, 400)}{place}"
