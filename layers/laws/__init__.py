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

from kernels.tolerance import error, limit
from layers import contract
from layers.facts import L
from layers.laws.case import (
    B,
    Broken,
    Case,
    Equal,
    NotApplicable,
    Remark,
    Result,
    at,
    jit,
    measured,
    moves,
    worst,
)
from ssm.sequence import Sequence

__all__ = ["LAWS", "Case", "Finding", "examine", "worst"]


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


def modes(case: Case) -> Yields:
    """One call equals pieces equals single tokens: outputs and final state."""
    case.needs("state")
    one_call = case(case.x, case.state)
    p = case.piece
    sizes = [p, 1, p, *[1] * (case.length - 2 * p - 1)]
    ones = [1] * case.length
    yield Equal("pieces", case.in_pieces(sizes, case.x, case.state), one_call)
    yield Equal("single tokens", case.in_pieces(ones, case.x, case.state), one_call)
    yield Equal("no state and a fresh one", case(case.x), case(case.x, case.initial()))


def mode_gradients(case: Case) -> Yields:
    """Without a state and with a fresh one the gradients are the same; those through
    pieces are the law of `lax.scan`."""
    case.needs("state")
    _, fresh = case.gradients(case.whole, case.x, None)
    _, started = case.gradients(case.whole, case.x, case.initial())
    yield Equal("no state", fresh[:2], started[:2], "gradient")


def causality(case: Case) -> Yields:
    """Later inputs do not change earlier outputs."""
    case.needs("state")
    t = case.length // 2
    changed = case.x.at[:, t:].add(1.0)
    actual, expected = case(changed), case(case.x)
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


def _paddings(case):
    """x with NaN in masked places, its mask and the real places [B, L], three times:
    the rows are padded in three ways, by turns."""
    total = case.length + EXTRA
    for turn in range(B):
        ways = [list(PADDINGS.values())[(row + turn) % 3] for row in range(B)]
        keep = np.stack([way(case.length, total) for way in ways])
        places = np.stack([np.flatnonzero(row) for row in keep])
        x = jnp.full((B, total, *case.x.shape[2:]), jnp.nan)
        x = x.at[np.arange(B)[:, None], places].set(case.x)
        yield x, jnp.asarray(keep), jnp.asarray(places)


def _hidden_is_zero(subject, values, mask):
    real = np.asarray(mask).reshape(*mask.shape, *[1] * (values.ndim - 2))
    nonzero = np.argwhere(np.where(real, 0, np.asarray(values)) != 0)
    if len(nonzero):
        row, token = nonzero[0][:2]
        raise Broken(f"{subject} is not 0 at a masked token: row {row}, token {token}")


def padding(case: Case) -> Yields:
    """Masked tokens, even NaN, change nothing, left, right and inside: outputs and
    final state; their outputs are exactly 0."""
    case.needs("mask")
    for x, mask, places in _paddings(case):
        for state in [None] if case.state is None else [None, case.state]:
            y, final = case(x, state, Sequence(mask=mask))
            _hidden_is_zero("the output", y, mask)
            actual = Result(at(y, places), final)
            yield Equal("NaN in masked tokens", actual, case(case.x, state))


def padding_gradients(case: Case) -> Yields:
    """Gradients ignore masked tokens (in train mode)."""
    case.needs("mask")
    _, expected = case.gradients(case.whole, case.x, case.state)
    for x, mask, places in _paddings(case):
        _, actual = case.gradients(case.padded, x, case.state, mask, places)
        _hidden_is_zero("the gradient", actual.input, mask)
        actual = actual._replace(input=at(actual.input, places))
        yield Equal("NaN in masked tokens", actual, expected, "gradient")


def _documents(case):
    """Two documents of `piece` tokens in every row, all other tokens alone: their
    starts [B, 2] and the resets [B, L]."""
    p, last = case.piece, case.length - case.piece
    starts = np.asarray([[0, p], [p // 2, last - 1], [1, last]])
    reset = np.ones((B, case.length), bool)
    for row, pair in enumerate(starts):
        for start in pair:
            reset[row, start + 1 : start + p] = False
    return starts, jnp.asarray(reset)


def packing(case: Case) -> Yields:
    """Documents packed with resets, in every row its own, equal separate calls: outputs
    and final state."""
    case.needs("reset")
    starts, reset = _documents(case)
    alone = case.tokens()
    output = alone.output.reshape(case.x.shape)
    ends = jnp.arange(1, B + 1) * case.length - 1
    final = jax.tree.map(lambda s: s[ends], alone.state)
    rows = np.arange(B)[:, None]
    for start in starts.T:
        places = start[:, None] + np.arange(case.piece)
        document = case(at(case.x, places))
        output = output.at[rows, places].set(document.output)
        at_end = start + case.piece == case.length
        final = jax.tree.map(
            lambda old, new, rows=at_end: jnp.where(_along(rows, old), new, old),
            final,
            document.state,
        )
    actual = case(case.x, case.state, Sequence(reset=reset))
    yield Equal("documents", actual, Result(output, final))


def _along(rows, leaf):
    """Flags [B] that broadcast against a leaf [B, ...]."""
    return jnp.asarray(rows).reshape(-1, *[1] * (leaf.ndim - 1))


def packing_gradients(case: Case) -> Yields:
    """No gradient crosses a reset: it is the sum of the gradients of what is before and
    what is behind it, each alone."""
    case.needs("reset", "mask")
    cuts = np.asarray([case.piece, case.length // 2, case.length // 4])[:, None]
    reset = jnp.asarray(np.arange(case.length) == cuts)

    def packed(variables, x, state, reset):
        return case.layer.apply(variables, x, state, Sequence(reset=reset), True)

    _, actual = case.gradients(packed, case.x, case.state, reset)
    # In the shapes of the law of padding, which is compiled already.
    position = np.arange(case.length + EXTRA)
    before, behind = position < cuts, (position >= cuts) & (position < case.length)
    x = jnp.pad(case.x, [(0, 0), (0, EXTRA)] + [(0, 0)] * (case.x.ndim - 2))
    places = jnp.asarray(np.tile(np.arange(case.length), (B, 1)))

    def alone(state, mask, ends):
        mask = jnp.asarray(mask)
        return case.gradients(case.padded, x, state, mask, places, ends=ends)[1]

    first, second = alone(case.state, before, 0.0), alone(case.initial(), behind, 1.0)
    expected = jax.tree.map(jnp.add, first[:2], second[:2])
    expected = first._replace(
        parameters=expected[0], input=expected[1][:, : case.length]
    )
    yield Equal("one reset a row", actual, expected, "gradient")


def masked_reset(case: Case) -> Yields:
    """A reset on a masked token applies to the next real one, in this call or later."""
    case.needs("reset", "mask")
    p = case.piece
    first = np.asarray([0, 1, 0])
    second = first + p + np.asarray([2, 1, p - 1])
    rows, run = np.arange(B)[:, None], np.arange(p)
    ahead, behind = (start[:, None] + run for start in (first, second))
    mask, reset = np.zeros((2, B, case.length), bool)
    mask[rows, ahead] = mask[rows, behind] = True
    reset[rows, second[:, None] - 1] = reset[:, -1] = True
    sequence = Sequence(mask=jnp.asarray(mask), reset=jnp.asarray(reset))
    y, final = case(case.x, case.state, sequence)
    actual = jnp.concatenate([at(y, ahead), at(y, behind)], axis=1)
    expected = [
        case(at(case.x, ahead), case.state).output,
        case(at(case.x, behind)).output,
    ]
    yield Equal(
        "documents",
        Result(actual, final),
        Result(jnp.concatenate(expected, axis=1), case.initial()),
    )


def every_reset(case: Case) -> Yields:
    """With a reset at every token, each token is alone."""
    case.needs("reset")
    reset = jnp.ones((B, case.length), bool)
    together = case(case.x, case.state, Sequence(reset=reset)).output
    alone = case.tokens().output.reshape(together.shape)
    yield Equal("all tokens", Result(together, None), Result(alone, None))


def isolation(case: Case) -> Yields:
    """NaN before a reset, in tokens or in the state, does not get behind it."""
    case.needs("reset")
    cuts = np.asarray([2, case.length // 2, case.length - 1])[:, None]
    reset = Sequence(reset=jnp.asarray(np.arange(case.length) == cuts))
    before = jnp.asarray(np.arange(case.length) < cuts)

    def behind(x, state):
        y, final = case(x, state, reset)
        return Result(jnp.where(_beside(before, y), 0, y), final)

    expected = behind(case.x, case.state)
    x = jnp.where(_beside(before, case.x), jnp.nan, case.x)
    yield Equal("NaN in tokens", behind(x, case.state), expected)
    if case.state is not None:
        poisoned = jax.tree.map(
            lambda s: jnp.full_like(s, jnp.nan) if moves(s) else s, case.state
        )
        yield Equal("NaN in the state", behind(case.x, poisoned), expected)


def _beside(flags, values):
    """Flags [B, L] that broadcast against values [B, L, ...]."""
    return flags.reshape(*flags.shape, *[1] * (values.ndim - 2))


def rows(case: Case) -> Yields:
    """Every row, with a mask, resets, elapsed times and a state of its own, is what it
    is alone."""
    sequence = case.everything()
    together = case(case.x, case.state, sequence)
    for row in range(B):
        take_row = functools.partial(jax.tree.map, lambda leaf, r=row: leaf[r : r + 1])
        alone = case(take_row(case.x), take_row(case.state), take_row(sequence))
        yield Equal(f"row {row} alone", alone, take_row(together))


def elapsed_time(case: Case) -> Yields:
    """dt = 1 equals no dt, another dt changes every row; with random dt one call equals
    single tokens, masks and resets included."""
    case.needs("dt")
    dt = case.dt()
    one_call = case(case.x, case.state, Sequence(dt=dt))
    plain = case(case.x, case.state)
    for row in range(B):
        if error(one_call.output[row], plain.output[row]) <= limit("float32"):
            raise Broken(f"dt changes nothing in row {row}")
    ones = case(case.x, case.state, Sequence(dt=jnp.ones_like(dt)))
    yield Equal("dt = 1", ones, plain)
    if case.state is None:  # it reads the future: nothing to feed token by token
        return
    tokens = [1] * case.length
    plainly = Sequence(
        jnp.ones(dt.shape, bool) if case.takes("mask") else None,
        jnp.zeros(dt.shape, bool) if case.takes("reset") else None,
        dt,
    )
    yield Equal(
        "single tokens", case.in_pieces(tokens, case.x, case.state, plainly), one_call
    )
    sequence = case.everything()
    yield Equal(
        "single tokens with masks and resets",
        case.in_pieces(tokens, case.x, case.state, sequence),
        case(case.x, case.state, sequence),
    )


def elapsed_gradients(case: Case) -> Yields:
    """Gradients with random dt agree between one call and pieces, d/d dt included."""
    case.needs("dt", "state")

    def whole(variables, x_dt, state):
        x, dt = x_dt
        return case.layer.apply(variables, x, state, Sequence(dt=dt))

    def pieces(variables, x_dt, state):
        return case.scanned(variables, x_dt[0], state, x_dt[1])

    x_dt = case.x, case.dt()
    _, actual = case.gradients(pieces, x_dt, case.state)
    _, expected = case.gradients(whole, x_dt, case.state)
    if not jnp.any(expected.input[1]):
        raise Broken("no gradient reaches dt")
    yield Equal("pieces", actual, expected, "gradient")


def low_precision(case: Case) -> Yields:
    """In bfloat16 the output is bfloat16 and near float32; states stay float32."""
    low = case.layer.clone(dtype=jnp.bfloat16)
    x = case.x.astype(jnp.bfloat16)
    y, state = jit(low.apply)(case.variables, x)
    if y.dtype != jnp.bfloat16:
        raise Broken(f"the output is {y.dtype}, not bfloat16")
    for leaf in jax.tree.leaves(state):
        if leaf.dtype not in (jnp.float32, jnp.complex64, jnp.int32, jnp.bool_):
            raise Broken(f"the state is {leaf.dtype}, not float32")
    expected = case(x.astype(jnp.float32)).output
    actual, expected = (
        Result(part.astype(jnp.float32), None) for part in (y, expected)
    )
    yield Equal("bfloat16", actual, expected, dtype="bfloat16")


def batch_equivariance(case: Case) -> Yields:
    """Examples do not see each other, be they NaN, and their order does not matter."""
    order = jnp.asarray([2, 0, 1])
    together = case(case.x, case.state)
    state = jax.tree.map(lambda s: s[order], case.state)
    poisoned = case(case.x.at[0].set(jnp.nan), case.state)
    yield Equal(
        "another order",
        case(case.x[order], state),
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


def sharding(case: Case) -> Yields:
    """A batch spread over devices gives what one device gives."""
    mesh = _mesh()
    if mesh.size == 1:
        raise NotApplicable("one device; emulate more to examine it")
    expected = _copies(case(case.x, case.state), mesh.size)
    x, state = _copies((case.x, case.state), mesh.size)
    actual = case(*jax.device_put((x, state), NamedSharding(mesh, SPREAD)))
    yield Equal(f"{mesh.size} devices", actual, expected)


def shard_map(case: Case) -> Yields:
    """In `jax.shard_map` with its default check, the batch spread over the devices that
    there are: values and gradients of a call, without a state and with one, and values
    of a single token."""
    mesh = _mesh()

    def spread(variables, x, state):
        call = jax.shard_map(
            case.plain,
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
    for state in [None] if case.state is None else [None, case.state]:
        name = "a call" if state is None else "a call with a state"
        result, gradients = case.gradients(spread, case.x, state)
        expected_result, expected = case.gradients(case.whole, case.x, state)
        yield Equal(name, result, expected_result)
        yield Equal(name, gradients, expected, "gradient")
    if case.state is not None:
        token = case.x[:, :1]
        step = jit(spread)(case.variables, token, case.state)
        yield Equal("a token", step, case(token, case.state))


def compiled(case: Case) -> Yields:
    """Compiled or not, and however hard the compiler tries."""
    quickly = case(case.x)
    yield Equal("compiled", jax.jit(case.plain)(case.variables, case.x), quickly)
    yield Equal("not compiled", case.plain(case.variables, case.x), quickly)


def vmapped(case: Case) -> Yields:
    """`jax.vmap` over the rows gives what the batch gives."""
    over_rows = jit(jax.vmap(case.plain, (None, 0, 0)))
    x, state = jax.tree.map(lambda leaf: leaf[:, None], (case.x, case.state))
    actual = jax.tree.map(lambda leaf: leaf[:, 0], over_rows(case.variables, x, state))
    yield Equal("rows", actual, case(case.x, case.state))


def rematerialised(case: Case) -> Yields:
    """`jax.checkpoint` changes neither values nor gradients."""
    remat = jax.checkpoint(case.whole)
    result, gradients = case.gradients(remat, case.x, case.state)
    expected_result, expected = case.gradients(case.whole, case.x, case.state)
    yield Equal("values", result, expected_result)
    yield Equal("gradients", gradients, expected, "gradient")


def scan_over_calls(case: Case) -> Yields:
    """A `jax.lax.scan` over calls, its state donated, equals one call: outputs, final
    state, and gradients through the pieces."""
    case.needs("state")
    result, gradients = case.gradients(case.scanned, case.x, case.state)
    expected_result, expected = case.gradients(case.whole, case.x, case.state)
    yield Equal("values", result, expected_result)
    yield Equal("gradients", gradients, expected, "gradient")
    donating = jit(lambda *args: Result(*case.scanned(*args)), donate_argnums=2)
    first = donating(case.variables, case.x, case.initial())
    expected = case(case.x, case.initial())
    yield Equal("a donated state", first, expected)
    expected = case(case.x, expected.state)
    second = donating(case.variables, case.x, first.state)
    yield Equal("a donated state, again", second, expected)


def in_x64(case: Case) -> Yields:
    """Under `jax.enable_x64` a float32 layer stays one: dtypes of parameters, outputs,
    states and gradients, and values, in a `jax.lax.scan` over calls where there is a
    state."""
    call = case.whole if case.state is None else case.scanned
    narrow = jax.eval_shape(case.initial)
    expected_result, expected = case.gradients(call, case.x, case.state)
    with jax.enable_x64(True):
        parameters = jax.eval_shape(
            lambda key: nn.unbox(case.layer.init({"params": key}, case.x)), case.key
        )
        _same_dtypes("parameters", parameters, case.variables)
        _same_dtypes("the initial state", jax.eval_shape(case.initial), narrow)
        result, gradients = case.gradients(call, case.x, case.state)
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


def length(case: Case) -> Yields:
    """A call of 2^16 tokens equals its halves, and the same in float64; a layer of
    quadratic cost is tried on as many as take ten seconds and a GiB."""
    tokens = _affordable(case)
    if tokens < LONG:
        yield Remark(f"tried on {tokens} tokens: more cost too much time or memory")
    layer, x, variables = _enlarged(case, tokens)
    what = f"{tokens} tokens"
    whole = jit(_calls(layer))(variables, x, None)
    if "state" not in case.refuses:
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


def _enlarged(case, tokens):
    """The layer with room for so many tokens, a call of them, and parameters."""
    layer = case.layer
    fields = [name for name in ("length", "context") if hasattr(layer, name)]
    room = {f: max(tokens, getattr(layer, f)) for f in fields}
    layer = layer.clone(**room)
    x = jax.random.normal(case.key, (1, tokens, *case.x.shape[2:]))
    variables = jit(layer.init)({"params": case.key}, x[:, :1])
    return layer, x, nn.unbox(variables)


def _calls(layer):
    return lambda variables, x, state: Result(*layer.apply(variables, x, state))


def _affordable(case):
    """LONG; of a layer whose cost grows with the square of the length, as two short
    calls show, the largest power of two that needs no more than SECONDS and MEMORY."""
    costs = []
    for tokens in PROBES:
        layer, x, variables = _enlarged(case, tokens)
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


def bad_input(case: Case) -> Yields:
    """Wrong ranks, L = 0 and fields of a wrong shape are ValueErrors that name them."""
    x, ones = case.x, jnp.ones((B, case.length), bool)
    bad_calls = {
        "x": [(x[0], None), (x[:, :0], None), (x[..., :-1], None)],
        "mask": [
            (x, Sequence(mask=ones[:, 1:])),
            (x, Sequence(mask=ones[0])),
            (x, Sequence(mask=ones.astype(jnp.float32))),
        ],
        "reset": [(x, Sequence(reset=ones[1:]))],
        "dt": [(x, Sequence(dt=jnp.ones((B, case.length + 1))))],
    }
    for name, calls in bad_calls.items():
        for x, sequence in calls:
            _must_refuse(case, name, x, None, sequence)
    yield from ()


def _must_refuse(case, name, x, state, sequence):
    try:
        jax.eval_shape(case.plain, case.variables, x, state, sequence)
    except ValueError as message:
        if not str(message).startswith(f"{name}:"):
            raise Broken(f"{name}: its refusal does not name it: {message}") from None
    else:
        raise Broken(f"{name}: accepted where it must be refused")


def declared_refusals(case: Case) -> Yields:
    """What `REFUSES` declares is refused by a ValueError that names it, and nothing
    else is; without a state there is none to ask for, with one it keeps its form."""
    ones = jnp.ones((B, case.length))
    for name, value in {
        "mask": ones.astype(bool),
        "reset": ones.astype(bool),
        "dt": ones,
    }.items():
        sequence = Sequence(**{name: value})
        if name in case.refuses:
            _must_refuse(case, name, case.x, None, sequence)
        else:
            jax.eval_shape(case.plain, case.variables, case.x, None, sequence)
    _, final = jax.eval_shape(case.plain, case.variables, case.x)
    if "state" not in case.refuses:
        expected = jax.eval_shape(case.initial)
        form = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
        if form(final) != form(expected):
            raise Broken(
                f"state: init_state makes {form(expected)}, a call {form(final)}"
            )
        return
    _must_refuse(case, "state", case.x, jnp.zeros((B, 1)), None)
    if final is not None:
        raise Broken("state: declared to be refused, but a call returns one")
    try:
        case.layer.init_state(B)
    except ValueError:
        yield from ()
    else:
        raise Broken("state: declared to be refused, but init_state makes one")


LAWS: dict[str, Callable[[Case], Yields]] = {
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
    case = Case(layer, length, seed)
    contract.check_call(layer)
    return [_examine(case, law) for law in (LAWS if only is None else only)]


def _examine(case, law):
    largest, remarks = None, []
    try:
        for outcome in LAWS[law](case):
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
