"""The laws that every layer obeys, as a library and a command.

    python -m layers.laws --layer s5
    python -m layers.laws --layer my_package.my_module.MyLayer
    python -m layers.laws --all

`examine(layer)` runs them on any module of the contract, a user's own included, and
returns one `Finding` per law: its error, its limit, or why it does not apply.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.tolerance import error, limit
from layers.build import get
from layers.examples import CASES, FEATURES, L
from ssm.sequence import Sequence

B = 3  # batch of the examined calls


class Finding(NamedTuple):
    """What one law found: `error` against `limit`, or the `reason` it says nothing."""

    law: str
    error: float | None
    limit: float | None
    reason: str = ""

    @property
    def passed(self):
        return self.error is None or self.error <= self.limit


class NotApplicable(Exception):
    """Raised by a law that says nothing about this layer; the message says why."""


class Case:
    """A layer with parameters, an input and a random state to examine it on."""

    def __init__(self, layer, length=L, seed=0):
        self.layer, self.length = layer, length
        self.compiled = {}  # call -> its compiled gradients, which several laws share
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        token = *getattr(layer, "size", ()), layer.features
        self.x = jax.random.normal(next(keys), (B, length, *token))
        self.variables = jax.jit(layer.init)({"params": next(keys)}, self.x)
        self.apply = jax.jit(
            lambda variables, x, state, sequence: layer.apply(
                variables, x, state, sequence
            )
        )
        self.key = next(keys)
        try:
            layer.init_state(B)
        except ValueError:
            self.state = None  # no recurrent mode
        else:
            _, reached = self(self.x[:, :3])
            self.state = _random_like(next(keys), reached)

    def __call__(self, x, state=None, sequence=None):
        return self.apply(self.variables, x, state, sequence)

    def needs_state(self):
        if self.state is None:
            raise NotApplicable("no recurrent mode: the layer reads the future")

    def needs_reset(self):
        reset = Sequence(reset=jnp.zeros((B, self.length), bool))
        try:
            jax.eval_shape(self, self.x, self.state, reset)
        except ValueError as refusal:
            if not str(refusal).startswith("reset:"):
                raise
            raise NotApplicable(f"refused: {refusal}") from None

    def in_pieces(self, sizes, x, state, sequence):
        """The outputs and final state of consecutive calls of the given lengths."""
        outputs, start = [], 0
        for size in sizes:
            piece = slice(start, start + size)
            part = jax.tree.map(lambda field, p=piece: field[:, p], sequence)
            y, state = self(x[:, piece], state, part)
            outputs.append(y)
            start += size
        return jnp.concatenate(outputs, axis=1), state

    def gradients(self, call: Callable, x, state, *extra):
        """Gradients of random contractions of the output and the final state with
        respect to the parameters, the input and the initial state.
        call(variables, x, state, *extra) -> (y, state)."""

        leaves, structure = jax.tree.flatten(state)

        def scalar(variables, x, moving, fixed, *extra):
            state = [f if m is None else m for f, m in zip(fixed, moving, strict=True)]
            state = jax.tree.unflatten(structure, state)
            total = 0.0
            for i, leaf in enumerate(
                jax.tree.leaves(call(variables, x, state, *extra))
            ):
                weight = jax.random.normal(jax.random.key(i), leaf.shape)
                total = total + jnp.sum(leaf.real * weight)
                if jnp.iscomplexobj(leaf):
                    total = total + jnp.sum(leaf.imag * weight[::-1])
            return total

        moving = [leaf if _moves(leaf) else None for leaf in leaves]
        fixed = [None if _moves(leaf) else leaf for leaf in leaves]
        argnums = (0, 1) if state is None else (0, 1, 2)
        compiled = self.compiled.setdefault(call, jax.jit(jax.grad(scalar, argnums)))
        return compiled(self.variables, x, moving, fixed, *extra)

    def whole(self, variables, x, state):
        """One call on everything, in train mode."""
        return self.layer.apply(variables, x, state, None, True)


def _moves(leaf):
    """Whether a leaf has a gradient: counts and flags have none."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _random_like(key, tree):
    """A state with normal entries (complex ones in both parts); counts and flags stay
    as they are."""

    def draw(key, leaf):
        if jnp.iscomplexobj(leaf):
            parts = jax.random.normal(key, (2, *leaf.shape))
            return jax.lax.complex(parts[0], parts[1])
        if not _moves(leaf):
            return leaf
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, map(draw, keys, leaves))


def worst(actual, expected):
    """The largest leaf error of two trees (see `kernels.tolerance.error`)."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max((error(a, e) for a, e in pairs), default=0.0)


def modes(case):
    """One call equals pieces equals single tokens: outputs and final state."""
    case.needs_state()
    whole = case(case.x, case.state)
    sizes = [5, case.length - 5]
    pieces = case.in_pieces(sizes, case.x, case.state, None)
    steps = case.in_pieces([1] * case.length, case.x, case.state, None)
    fresh = case(case.x, case.layer.init_state(B))
    return max(worst(pieces, whole), worst(steps, whole), worst(case(case.x), fresh))


def mode_gradients(case):
    """Gradients through one call equal gradients through pieces."""
    case.needs_state()

    def pieces(variables, x, state):
        first, state = case.layer.apply(variables, x[:, :5], state)
        second, state = case.layer.apply(variables, x[:, 5:], state)
        return jnp.concatenate([first, second], axis=1), state

    def fresh(variables, x, state):
        return case.layer.apply(variables, x)

    started = case.gradients(case.whole, case.x, case.layer.init_state(B))
    return max(
        worst(
            case.gradients(pieces, case.x, case.state),
            case.gradients(case.whole, case.x, case.state),
        ),
        worst(case.gradients(fresh, case.x, None), started[:2]),
    )


def causality(case):
    """Later inputs do not change earlier outputs."""
    case.needs_state()
    t = case.length // 2
    changed = case.x.at[:, t:].add(1.0)
    return worst(case(changed)[0][:, :t], case(case.x)[0][:, :t])


PADDINGS = {
    "left": lambda real, total: np.arange(total) >= total - real,
    "right": lambda real, total: np.arange(total) < real,
    "inside": lambda real, total: np.isin(
        np.arange(total), np.linspace(0, total - 1, real).astype(int)
    ),
}


def _padded(case, where, extra=4):
    """x with NaN in `extra` masked places, its Sequence, and the real positions."""
    keep = PADDINGS[where](case.length, case.length + extra)
    places = np.flatnonzero(keep)
    x = jnp.full((B, case.length + extra, *case.x.shape[2:]), jnp.nan)
    mask = jnp.broadcast_to(jnp.asarray(keep), (B, case.length + extra))
    return x.at[:, places].set(case.x), Sequence(mask=mask), places


def padding(case):
    """Masked tokens, even NaN, change nothing, left, right and inside: outputs, final
    state and gradients; their outputs are exactly 0."""
    wrong = 0.0
    for where in PADDINGS:
        x, sequence, places = _padded(case, where)
        for state in [None] if case.state is None else [None, case.state]:
            y, final = case(x, state, sequence)
            plain = case(case.x, state)
            hidden = jnp.delete(y, places, axis=1)
            wrong = max(wrong, worst((y[:, places], final), plain))
            wrong = max(wrong, float("inf") if jnp.any(hidden != 0) else 0.0)
    return wrong


def padding_gradients(case):
    """Gradients ignore masked tokens (in train mode)."""

    def padded(variables, x, state, sequence, places):
        y, state = case.layer.apply(variables, x, state, sequence, True)
        return jnp.take(y, places, axis=1), state

    wrong = 0.0
    expected = case.gradients(case.whole, case.x, case.state)
    for where in PADDINGS:
        x, sequence, places = _padded(case, where)
        found = case.gradients(padded, x, case.state, sequence, jnp.asarray(places))
        hidden = jnp.delete(found[1], places, axis=1)
        wrong = max(wrong, float("inf") if jnp.any(hidden != 0) else 0.0)
        wrong = max(wrong, worst((found[0], found[1][:, places]), expected[:2]))
    return wrong


def packing(case):
    """Documents packed with resets equal separate calls: outputs and final state."""
    case.needs_reset()
    cuts = [0, 4, 5, case.length]
    reset = np.zeros((B, case.length), bool)
    reset[:, cuts[:-1]] = True
    y, final = case(case.x, case.state, Sequence(reset=jnp.asarray(reset)))
    separate = [case(case.x[:, a:b]) for a, b in itertools.pairwise(cuts)]
    outputs = jnp.concatenate([piece[0] for piece in separate], axis=1)
    return worst((y, final), (outputs, separate[-1][1]))


def packing_gradients(case):
    """No gradient crosses a reset."""
    case.needs_reset()
    cut = 5
    reset = jnp.zeros((B, case.length), bool).at[:, cut].set(True)

    def packed(variables, x, state):
        return case.layer.apply(variables, x, state, Sequence(reset=reset))

    def separate(variables, x, state):
        first, _ = case.layer.apply(variables, x[:, :cut], state)
        second, last = case.layer.apply(variables, x[:, cut:])
        return jnp.concatenate([first, second], axis=1), last

    return worst(
        case.gradients(packed, case.x, case.state),
        case.gradients(separate, case.x, case.state),
    )


def masked_reset(case):
    """A reset on a masked token applies to the next real one, in this call or later."""
    case.needs_reset()
    real = [0, 1, 2, 3, 7, 8, 9, 10]
    mask = jnp.zeros((B, case.length), bool).at[:, jnp.asarray(real)].set(True)
    reset = jnp.zeros((B, case.length), bool).at[:, jnp.asarray([5, 12])].set(True)
    y, final = case(case.x, case.state, Sequence(mask=mask, reset=reset))
    first, _ = case(case.x[:, :4], case.state)
    second, _ = case(case.x[:, 7:11])
    wrong = worst(y[:, jnp.asarray(real)], jnp.concatenate([first, second], axis=1))
    if case.state is None:
        return wrong
    return max(wrong, worst(final, case.layer.init_state(B)))


def every_reset(case):
    """With a reset at every token, each token is alone."""
    case.needs_reset()
    reset = jnp.ones((B, case.length), bool)
    together, _ = case(case.x, case.state, Sequence(reset=reset))
    alone, _ = case(case.x.reshape(-1, 1, *case.x.shape[2:]))
    return worst(together, alone.reshape(together.shape))


def elapsed_time(case):
    """dt = 1 equals no dt; with random dt one call equals single tokens, masks and
    resets included. A layer without elapsed times says so in a ValueError on dt."""
    dt = jax.random.uniform(case.key, (B, case.length), minval=0.2, maxval=3.0)
    try:
        whole = case(case.x, case.state, Sequence(dt=dt))
    except ValueError as refusal:
        if "dt" in str(refusal):
            raise NotApplicable(f"refused: {refusal}") from None
        raise
    ones = case(case.x, case.state, Sequence(dt=jnp.ones_like(dt)))
    if case.state is None:  # it reads the future: nothing to feed token by token
        return worst(ones, case(case.x))
    steps = case.in_pieces([1] * case.length, case.x, case.state, Sequence(dt=dt))
    mask = jnp.ones_like(dt, bool).at[:, 3:5].set(False)
    reset = jnp.zeros_like(dt, bool).at[:, 7].set(True)
    everything = Sequence(mask, reset, dt)
    mixed = case(case.x, case.state, everything)
    mixed_steps = case.in_pieces([1] * case.length, case.x, case.state, everything)
    return max(
        worst(ones, case(case.x, case.state)),
        worst(steps, whole),
        worst(mixed_steps, mixed),
    )


def elapsed_gradients(case):
    """Gradients with random dt agree between one call and pieces, d/d dt included."""
    dt = jax.random.uniform(case.key, (B, case.length), minval=0.2, maxval=3.0)
    try:
        case(case.x, case.state, Sequence(dt=dt))
    except ValueError as refusal:
        raise NotApplicable(f"refused: {refusal}") from None
    case.needs_state()

    def whole(variables, x_dt, state):
        x, dt = x_dt
        return case.layer.apply(variables, x, state, Sequence(dt=dt))

    def pieces(variables, x_dt, state):
        x, dt = x_dt
        parts = []
        for piece in (slice(0, 4), slice(4, None)):
            part = Sequence(dt=dt[:, piece])
            y, state = case.layer.apply(variables, x[:, piece], state, part)
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    return worst(
        case.gradients(pieces, (case.x, dt), case.state),
        case.gradients(whole, (case.x, dt), case.state),
    )


def low_precision(case):
    """In bfloat16 the output is bfloat16 and near float32; states stay float32."""
    if not hasattr(case.layer, "dtype"):
        raise NotApplicable("the layer has no dtype field")
    low = case.layer.clone(dtype=jnp.bfloat16)
    y, state = jax.jit(low.apply)(case.variables, case.x.astype(jnp.bfloat16))
    expected, _ = case(case.x.astype(jnp.bfloat16).astype(jnp.float32))
    wide = all(
        leaf.dtype in (jnp.float32, jnp.complex64, jnp.int32, jnp.bool_)
        for leaf in jax.tree.leaves(state)
    )
    if y.dtype != jnp.bfloat16 or not wide:
        return float("inf")
    return worst(y.astype(jnp.float32), expected)


def batch_equivariance(case):
    """Examples do not see each other, be they NaN, and their order does not matter."""
    order = jnp.asarray([2, 0, 1])
    whole = case(case.x, case.state)
    state = jax.tree.map(lambda s: s[order], case.state)
    shuffled = case(case.x[order], state)
    one = jax.tree.map(lambda s: s[1:2], case.state)
    alone = case(case.x[1:2], one)
    beside = case(case.x.at[0].set(jnp.nan), case.state)
    return max(
        worst(*(jax.tree.map(lambda leaf: leaf[1:], z) for z in (beside, whole))),
        worst(shuffled, jax.tree.map(lambda leaf: leaf[order], whole)),
        worst(alone, jax.tree.map(lambda leaf: leaf[1:2], whole)),
    )


def sharding(case):
    """A batch spread over devices gives what one device gives."""
    devices = jax.local_device_count()
    if devices == 1:
        raise NotApplicable("one device; emulate more to examine it")
    mesh = jax.make_mesh((devices,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.concatenate([case.x] * devices)
    spread = case(jax.device_put(x, place))
    return worst(spread, case(x))


def bad_input(case):
    """Wrong ranks, L = 0 and fields of a wrong shape are ValueErrors that name them."""
    x, ones = case.x, jnp.ones((B, case.length), bool)
    wrong = {
        "x": [(x[0], None), (x[:, :0], None), (x[..., :-1], None)],
        "mask": [
            (x, Sequence(mask=ones[:, 1:])),
            (x, Sequence(mask=ones[0])),
            (x, Sequence(mask=ones.astype(jnp.float32))),
        ],
        "reset": [(x, Sequence(reset=ones[1:]))],
        "dt": [(x, Sequence(dt=jnp.ones((B, case.length + 1))))],
    }
    for name, calls in wrong.items():
        for x, sequence in calls:
            try:
                case(x, None, sequence)
            except ValueError as message:
                if not str(message).startswith(f"{name}:"):
                    raise
            else:
                return float("inf")
    return 0.0


def bidirectional_refusal(case):
    """A layer without a recurrent mode says so when given or asked for a state."""
    if case.state is not None:
        raise NotApplicable("the layer has a recurrent mode")
    _, state = case(case.x)
    try:
        case(case.x, jnp.zeros((B, 1)))
    except ValueError as refusal:
        return 0.0 if state is None and "state" in str(refusal) else float("inf")
    return float("inf")


class Law(NamedTuple):
    check: Callable[[Case], float]
    limit: float


VALUE = limit("float32", "value")
GRADIENT = limit("float32", "gradient")

LAWS = {
    "one call = pieces = steps": Law(modes, VALUE),
    "one call = pieces, gradients": Law(mode_gradients, GRADIENT),
    "causality": Law(causality, VALUE),
    "padding": Law(padding, VALUE),
    "padding, gradients": Law(padding_gradients, GRADIENT),
    "packing": Law(packing, VALUE),
    "packing, gradients": Law(packing_gradients, GRADIENT),
    "reset on a masked token": Law(masked_reset, VALUE),
    "reset everywhere": Law(every_reset, VALUE),
    "elapsed time": Law(elapsed_time, VALUE),
    "elapsed time, gradients": Law(elapsed_gradients, GRADIENT),
    "bfloat16": Law(low_precision, limit("bfloat16", "value")),
    "batch": Law(batch_equivariance, VALUE),
    "sharding": Law(sharding, VALUE),
    "bad input": Law(bad_input, 0.0),
    "no recurrent mode": Law(bidirectional_refusal, 0.0),
}


def examine(layer, length=L, seed=0, only=None):
    """Every law (or those named in `only`) on one layer: a list of `Finding`.

    `layer` is a Linen module with a field `features` and the contract of a mixer, over
    tokens [features] or, with a field `size`, over frames [h, w, features].
    """
    case = Case(layer, length, seed)
    findings = []
    for name in LAWS if only is None else only:
        law = LAWS[name]
        try:
            findings.append(Finding(name, float(law.check(case)), law.limit))
        except NotApplicable as reason:
            findings.append(Finding(name, None, None, str(reason)))
    return findings


def cases_of(name):
    """The examined instances of one layer: those of `CASES`, or the user's own class
    with its defaults."""
    known = {k: make for k, make in CASES.items() if k.split()[0] == name}
    return known or {name: lambda: get(name)(features=FEATURES)}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m layers.laws", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layer", help="a name of LAYERS or a dotted path")
    which.add_argument("--all", action="store_true", help="every layer of LAYERS")
    options, found = parser.parse_args(argv), {}
    try:
        cases = CASES if options.all else cases_of(options.layer)
        for name, make in cases.items():
            found[name] = examine(make())
            held = all(finding.passed for finding in found[name])
            done = f"{len(found)} of {len(cases)}"
            print(f"{done}: {name} {'holds' if held else 'FAILS'}", flush=True)
    except ValueError as problem:
        parser.error(str(problem))
    _print(found)
    return int(not all(f.passed for findings in found.values() for f in findings))


def _print(found):
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", title="largest error over largest value")
    for law in LAWS:
        table.add_column(law, min_width=7, max_width=10)
    reasons = {}
    for name, findings in found.items():
        row = []
        for finding in findings:
            if finding.error is None:
                note = reasons.setdefault(finding.reason, len(reasons) + 1)
                row.append(rf"- \[{note}]")
            else:
                text = f"{finding.error:.0e}" if finding.error else "0"
                row.append(text if finding.passed else f"[red]FAILS {text}[/red]")
        table.add_row(name, *row)
    console = Console(width=220)
    console.print(table)
    for reason, note in reasons.items():
        console.print(rf"\[{note}] {reason}", highlight=False)
    failed = [
        f"{name}: {f.law}" for name, fs in found.items() for f in fs if not f.passed
    ]
    console.print("failed: " + "; ".join(failed) if failed else "every law holds")


if __name__ == "__main__":
    sys.exit(main())
