"""On TPUs: a program walks through the chunks of a few heads, their states in VMEM.

q, k, v and their gradients stay as they lie in memory, [B, L, heads x width] in their
own dtypes: a block has whole tiles of lanes, so as many heads as fill these, and all
that a chunk needs is widened, masked and, by the delta rule, solved in VMEM. Nothing of
the size of v is written around the kernels.

The forward pass writes, where there will be a backward one, the state before every
chunk and the inverse of its system (I + A). The backward pass walks from the end with
the gradient of the state, and makes all gradients of a chunk at once. Decays, one
number per token and head, are cumulated inside chunks by XLA, see decay.py.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, compat, segments
from kernels.chunked_scan import isolation

CHUNK = 128  # steps: the width of the matrix unit, a power of two
LANES = 128  # of a tile
MOST = 8  # heads of a program, whose code is made for each of them
ROWS = 8  # one value per token of a head each, see `_weights`


def unsupported(q, v, log_decay, beta) -> str | None:
    if log_decay is not None and log_decay.ndim == 4:
        return "takes no decay per channel"
    return blocks.unsupported(q, v)


def chunked_scan(q, k, v, log_decay, beta, state, into):
    """o [B, L, H, V] and the final state; see reference.chunked_scan."""
    batch, length, heads, values = v.shape
    keys = q.shape[3]
    if _together(q, v) > MOST:  # tiles of their own for every head
        q, k, v = (_padded(x, 0, -x.shape[3] % LANES) for x in (q, k, v))
        state = _padded(state, -keys % LANES, -values % LANES)
    plan = _Plan.of(q, v, beta is not None, into is not None)
    segment = jnp.zeros((batch, length), jnp.int32)
    if into is not None:
        segment = segments.ids(into)
    extra = -length % CHUNK

    def by_chunk(x, mode="constant"):
        """[B, L, H] -> [B, H, C, T]"""
        x = jnp.pad(x.astype(state.dtype), ((0, 0), (0, extra), (0, 0)), mode)
        return x.swapaxes(1, 2).reshape(batch, x.shape[2], -1, CHUNK)

    g, beta = (None if x is None else by_chunk(x) for x in (log_decay, beta))
    number = by_chunk(segment[..., None], "edge")
    q, k, v = (x.reshape(batch, length, -1) for x in (q, k, v))
    o, final = _scan(plan, q, k, v, g, beta, number, state)
    o = o.reshape(batch, length, heads, -1)[..., :values]
    return o, final[..., :keys, :values]


def _padded(x, rows, columns):
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, columns)))


def _together(q, v) -> int:
    """The fewest heads that have whole tiles, of their groups too, or all."""
    (heads, values), (groups, keys) = v.shape[2:], q.shape[2:]
    per_group = heads // groups

    def fits(count):
        shared = max(1, count // per_group)
        if heads % count or max(count, per_group) % min(count, per_group):
            return False
        whole = keys * shared % LANES == 0 or shared == groups
        return whole and values * count % LANES == 0

    return next(filter(fits, range(1, heads)), heads)


class _Plan(NamedTuple):
    """How heads are dealt to programs."""

    length: int
    keys: int  # of a head
    values: int
    heads: int  # of a program
    groups: int  # of a program
    parts: int  # programs with the heads of one group, where those are too many for one
    delta_rule: bool
    resets: bool

    @classmethod
    def of(cls, q, v, *rules) -> "_Plan":
        (_, length, heads, values), (groups, keys) = v.shape, q.shape[2:]
        count, per_group = _together(q, v), heads // groups
        shared, parts = max(1, count // per_group), max(1, per_group // count)
        return cls(length, keys, values, count, shared, parts, *rules)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)

    def group(self, head: int) -> int:
        """Of a program's head, among its groups."""
        return head * self.groups // self.heads


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, q, k, v, g, beta, number, state):
    """q, k [B, L, G K], v [B, L, H V], g and beta (or None) [B, H, C, T], number
    [B, 1, C, T] of the segments, state [B, H, K, V]."""
    o, final, *_ = _walk(plan, q, k, v, _weights(g, beta, number), state)
    return o, final


def _forward_rule(plan, q, k, v, g, beta, number, state):
    weights = _weights(g, beta, number)
    o, final, *saved = _walk(plan, q, k, v, weights, state, save=True)
    return (o, final), (q, k, v, weights, saved)


def _backward_rule(plan, residuals, cotangents):
    q, k, v, weights, saved = residuals
    dq, dk, dv, d_rows, d_state = _walk_back(plan, q, k, v, weights, saved, *cotangents)
    dq, dk = (x.sum(1).astype(q.dtype) for x in (dq, dk))
    d_beta = d_rows[..., 1, :] if plan.delta_rule else None
    return dq, dk, dv, d_rows[..., 0, :], d_beta, None, d_state


_scan.defvjp(_forward_rule, _backward_rule)


def _weights(g, beta, number):
    """[B, H, C, ROWS, T]: G in two parts (see decay.scalar), segment numbers, how
    much of the state before a chunk reaches a token, of a token the state behind, and
    of the state before the state behind: -1 where a reset lies between; beta."""
    # what is made of constants alone, a decay of 0 or one segment, XLA would compute
    # while it compiles, for 20 s
    g, number = jax.lax.optimization_barrier((g, number))
    unknown = jnp.isnan(g)
    # NaN reaches the rest of its segment, and no other
    latest = jax.lax.cummax(jnp.where(unknown, number, -1), 3)
    g = jnp.where(unknown, 0, jnp.maximum(g, -1e4))
    coarse = jnp.round(16 * g) / 16
    G = jnp.where(latest == number, jnp.nan, jnp.cumsum(coarse, -1))
    F = jnp.cumsum(g - coarse, -1)
    before = jnp.pad(number[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
    after = number[..., -1:]
    enter = jnp.where(number == before, jnp.exp(G + F), -1)
    leave = jnp.exp((G[..., -1:] - G) + (F[..., -1:] - F))
    leave = jnp.where(number == after, leave, -1)
    through = jnp.where(before == after, jnp.exp(G + F)[..., -1:], -1)
    rows = (G, F, jnp.broadcast_to(number, g.shape), enter, leave)
    rows = (*rows, jnp.broadcast_to(through, g.shape))
    rows = jnp.stack(rows if beta is None else (*rows, beta), -2)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, ROWS - rows.shape[-2]), (0, 0)])


class _Specs(NamedTuple):
    """The grid, and the blocks of arrays by what they have: tokens of groups, of their
    parts, of heads; a matrix per head; a matrix per head and chunk."""

    grid: tuple[int, int, int]
    keys: pl.BlockSpec
    key_parts: pl.BlockSpec
    values: pl.BlockSpec
    state: pl.BlockSpec
    per_chunk: object

    @classmethod
    def of(cls, plan, weights, reverse: bool) -> "_Specs":
        batch, heads, chunks = weights.shape[:3]

        def chunk(c):
            return chunks - 1 - c if reverse else c

        # `//` asks for the sign, whose lowering asks a TPU that may not be there
        def shared(j):
            return jax.lax.div(j, jnp.int32(plan.parts))

        def part(j):
            return jax.lax.rem(j, jnp.int32(plan.parts))

        def per_chunk(*shape):
            return pl.BlockSpec(
                (None, plan.heads, None, *shape), lambda b, j, c: (b, j, chunk(c), 0, 0)
            )

        width = plan.groups * plan.keys
        return cls(
            (batch, heads // plan.heads, chunks),
            pl.BlockSpec(
                (None, CHUNK, width), lambda b, j, c: (b, chunk(c), shared(j))
            ),
            pl.BlockSpec(
                (None, None, CHUNK, width),
                lambda b, j, c: (b, part(j), chunk(c), shared(j)),
            ),
            pl.BlockSpec(
                (None, CHUNK, plan.heads * plan.values),
                lambda b, j, c: (b, chunk(c), j),
            ),
            pl.BlockSpec(
                (None, plan.heads, plan.keys, plan.values),
                lambda b, j, c: (b, j, 0, 0),
            ),
            per_chunk,
        )

    def call(self, kernel, plan, dtype, **options):
        return compat.pallas_tpu_call(
            partial(kernel, plan),
            grid=self.grid,
            semantics=("parallel", "parallel", "arbitrary"),
            scratch_shapes=[pltpu.VMEM((plan.heads, plan.keys, plan.values), dtype)],
            **options,
        )


def _saved(plan, specs):
    """The blocks of what the backward pass needs: states, and inverses."""
    blocks = [specs.per_chunk(plan.keys, plan.values), specs.per_chunk(CHUNK, CHUNK)]
    return blocks[: 1 + plan.delta_rule]


def _walk(plan, q, k, v, weights, state, save=False):
    """o and the final state, and where `save` what `_saved` says."""
    specs, shape = _Specs.of(plan, weights, False), jax.ShapeDtypeStruct
    per_chunk = (plan.keys, plan.values), (CHUNK, CHUNK)
    saved = [shape((*weights.shape[:3], *size), state.dtype) for size in per_chunk]
    count = (1 + plan.delta_rule) * save
    return specs.call(
        _walk_kernel,
        plan,
        state.dtype,
        in_specs=[
            specs.keys,
            specs.keys,
            specs.values,
            specs.per_chunk(ROWS, CHUNK),
            specs.state,
        ],
        out_specs=[specs.values, specs.state, *_saved(plan, specs)[:count]],
        out_shape=[
            shape(v.shape, v.dtype),
            shape(state.shape, state.dtype),
            *saved[:count],
        ],
    )(q, k, v, weights, state)


def _walk_back(plan, q, k, v, weights, saved, d_out, d_final):
    """The gradients of q and k [B, parts, L, G K], of v, of g and beta [.., 2, T], and
    of the initial state."""
    specs, shape = _Specs.of(plan, weights, True), jax.ShapeDtypeStruct
    dtype = weights.dtype
    by_part = shape(
        (q.shape[0], plan.parts, *q.shape[1:]), q.dtype if plan.parts == 1 else dtype
    )
    return specs.call(
        _walk_back_kernel,
        plan,
        dtype,
        in_specs=[
            specs.keys,
            specs.keys,
            specs.values,
            specs.per_chunk(ROWS, CHUNK),
            specs.values,
            specs.state,
            *_saved(plan, specs),
        ],
        out_specs=[
            specs.key_parts,
            specs.key_parts,
            specs.values,
            specs.per_chunk(2, CHUNK),
            specs.state,
        ],
        out_shape=[
            by_part,
            by_part,
            shape(v.shape, v.dtype),
            shape((*weights.shape[:3], 2, CHUNK), dtype),
            shape(d_final.shape, dtype),
        ],
    )(q, k, v, weights, d_out, d_final, *saved)


# Inside a kernel, for one head.

COLUMNS = ((1,), (1,))  # a @ b.T
TURNED = ((0,), (0,))  # a.T @ b


def _dot(a, b, contract=((1,), (0,))):
    """In full precision where the inputs have it."""
    wide = a.dtype.itemsize > 2
    return jax.lax.dot_general(
        a,
        b.astype(a.dtype),
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if wide else None,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def _head(plan, chunk, ref, width, index):
    """[T, width] of a block of tokens; 0 for those that do not exist."""
    x = ref[:, index * width : (index + 1) * width]
    if plan.length % CHUNK == 0:
        return x
    step = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(step + chunk * CHUNK < plan.length, wide, 0).astype(x.dtype)


class _Decays(NamedTuple):
    """Of a chunk: between tokens [T, T], of the state that enters and the one that
    leaves as columns, from one to the other [1, 1]; -1 where nothing passes."""

    between: jax.Array
    enter: jax.Array
    leave: jax.Array
    through: jax.Array
    beta: jax.Array
    together: jax.Array  # [T, T], whether two tokens are of one segment
    known: jax.Array  # a column, whether no decay so far was NaN

    @classmethod
    def of(cls, rows) -> "_Decays":
        G, F, number, enter, leave, through, beta, _ = (
            rows[i : i + 1] for i in range(ROWS)
        )
        columns = [blocks.column(x) for x in (G, F, number, enter, leave, beta)]
        together = columns[2] == number
        linked = together & (_steps(0) >= _steps(1))
        span = (columns[0] - G) + (columns[1] - F)
        between = jnp.where(linked, jnp.exp(jnp.where(linked, span, 0)), -1)
        known = columns[0] == columns[0]
        return cls(between, *columns[3:5], through[:, :1], columns[5], together, known)


def _steps(axis):
    return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def _linked(weight, x):
    """weight x, or 0 where the weight is -1: 0 times what is not finite is NaN."""
    return jnp.where(weight < 0, 0, weight * x)


def _reached(weight, x):
    """x, or 0 where the weight is -1."""
    return jnp.where(weight < 0, 0, x)


class _System(NamedTuple):
    """By the delta rule u solves (I + A) u = beta lacking, where A is beta among below
    the diagonal."""

    among: jax.Array  # [T, T], how much of each key the tokens before hold
    beta: jax.Array
    lacking: jax.Array  # [T, V], v but for what the entering state recalls
    poisoned: jax.Array | None  # a column, of resets: what u is not finite

    @classmethod
    def of(cls, plan, k, v, S, decays) -> "_System":
        """What is not finite is taken out, to be put back into its own segment alone:
        see isolation.py."""
        k, v, beta, poisoned = k.astype(S.dtype), v.astype(S.dtype), decays.beta, None
        if plan.resets:
            usable = _usable(k) & _usable(v) & _usable(beta) & decays.known
            usable &= (decays.enter < 0) | _usable(_row_of(S))
            earlier = ~(decays.between < 0)
            poisoned = _any(earlier.astype(S.dtype), ~usable)
            k, v, beta, S = (isolation.finite(x) for x in (k, v, beta, S))
        among = _linked(decays.between, _dot(k, k, COLUMNS))
        lacking = v - _linked(decays.enter, _dot(k, S))
        if plan.resets:
            among, lacking = isolation.finite(among), isolation.finite(lacking)
        among = jnp.where(_steps(0) > _steps(1), among, 0)
        return cls(among, beta, lacking, poisoned)

    def solved(self, inverse):
        u = _dot(inverse, self.beta * self.lacking)
        return u if self.poisoned is None else jnp.where(self.poisoned, jnp.nan, u)

    def inverse(self):
        """(I + A)^-1: of diagonal blocks of doubling size, where the lower left of each
        two is -right (A's lower left) left."""
        A = self.beta * self.among
        i, j = _steps(0), _steps(1)

        def below(level):
            """A between two blocks of 2^level tokens that make one."""
            same = (i >> (level + 1)) == (j >> (level + 1))
            return jnp.where(same & ((i >> level) != (j >> level)), A, 0)

        def doubled(level, inverse):
            return inverse - _dot(inverse, _dot(below(level), inverse))

        first = (i == j).astype(A.dtype) - below(jnp.int32(0))
        last = jnp.int32(CHUNK.bit_length() - 1)
        return jax.lax.fori_loop(jnp.int32(1), last, doubled, first)

    def pulled(self, plan, decays, inverse, u, du):
        """The gradients of beta lacking, and of A."""
        if plan.resets:
            bad = _any(decays.together.astype(u.dtype), ~_usable(du))
            du = isolation.finite(du)
        right = _dot(inverse, du, TURNED)
        if plan.resets:
            right = jnp.where(bad, jnp.nan, right)
        A = -_dot(right, u, COLUMNS)
        return right, jnp.where(_steps(0) > _steps(1), A, 0)


def _usable(x):
    """A column: whether every value of a row, and its square, is finite."""
    ok = jnp.abs(x) < jnp.sqrt(jnp.finfo(x.dtype).max)
    return jnp.min(ok.astype(x.dtype), 1, keepdims=True) > 0


def _row_of(x):
    """[1, columns]: of every column the largest size, NaN where there is one."""
    return jnp.max(jnp.abs(x), 0, keepdims=True)


def _any(links, column):
    """A column: whether one of the linked tokens is True."""
    column = jnp.broadcast_to(column.astype(links.dtype), links.shape)
    return _dot(links, column)[:, :1] > 0


def _walk_kernel(plan, q_ref, k_ref, v_ref, rows_ref, state_ref, *refs):
    o_ref, final_ref, *saved, carry = refs
    chunk, outputs = pl.program_id(2), []

    @pl.when(chunk == 0)
    def _():
        carry[...] = state_ref[...]

    for head in range(plan.heads):
        S, kept = carry[head], []
        group = plan.group(head)
        q = _head(plan, chunk, q_ref, plan.keys, group)
        k = _head(plan, chunk, k_ref, plan.keys, group)
        u = _head(plan, chunk, v_ref, plan.values, head)
        decays = _Decays.of(rows_ref[head])
        if plan.delta_rule:
            system = _System.of(plan, k, u, S, decays)
            kept = [system.inverse()]
            u = system.solved(*kept).astype(k.dtype)
        for ref, x in zip(saved, [S, *kept], strict=False):
            ref[head] = x
        scores = _linked(decays.between, _dot(q, k, COLUMNS)).astype(q.dtype)
        outputs.append(_dot(scores, u) + _linked(decays.enter, _dot(q, S)))
        leaving = _linked(decays.leave, k).astype(k.dtype)
        increment = _dot(leaving, _reached(decays.leave, u), TURNED)
        carry[head] = _linked(decays.through, S) + increment
    o_ref[...] = _side_by_side(outputs).astype(o_ref.dtype)
    final_ref[...] = carry[...]


def _side_by_side(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def _walk_back_kernel(
    plan, q_ref, k_ref, v_ref, rows_ref, do_ref, d_final_ref, states_ref, *refs
):
    inverses, refs = refs[: plan.delta_rule], refs[plan.delta_rule :]
    dq_ref, dk_ref, dv_ref, d_rows_ref, d_state_ref, carry = refs
    step = pl.program_id(2)
    chunk = plan.chunks - 1 - step

    @pl.when(step == 0)
    def _():
        carry[...] = d_final_ref[...]

    d_queries, d_keys, d_values = [0] * plan.groups, [0] * plan.groups, []
    for head in range(plan.heads):
        S, dS, group = states_ref[head], carry[head], plan.group(head)
        q = _head(plan, chunk, q_ref, plan.keys, group)
        k = _head(plan, chunk, k_ref, plan.keys, group)
        u = _head(plan, chunk, v_ref, plan.values, head)
        do = _head(plan, chunk, do_ref, plan.values, head).astype(q.dtype)
        dtype = k.dtype
        decays = _Decays.of(rows_ref[head])
        between, enter, leave = decays.between, decays.enter, decays.leave
        if plan.delta_rule:
            inverse = inverses[0][head]
            system = _System.of(plan, k, u, S, decays)
            u = system.solved(inverse)
        wide_u, u = u, u.astype(dtype)
        scores = _linked(between, _dot(q, k, COLUMNS))
        d_scores = _dot(do, u, COLUMNS)
        du = _dot(scores.astype(dtype), do, TURNED) + _linked(leave, _dot(k, dS))
        dq = _linked(enter, _dot(do, S, COLUMNS))
        dk = _linked(leave, _dot(u, dS, COLUMNS))
        # each decay times its gradient
        pairs, entered, left = scores * d_scores, _sums(q * dq), _sums(k * dk)
        d_scores = _linked(between, d_scores).astype(dtype)
        dk += _dot(d_scores, q, TURNED)
        increment = _dot(_linked(enter, q).astype(dtype), _reached(enter, do), TURNED)
        if plan.delta_rule:
            wide_k = k.astype(S.dtype)
            right, dA = system.pulled(plan, decays, inverse, wide_u, du)
            d_rows_ref[head, 1:2, :] = _sums(dA * system.among) + _sums(
                right * system.lacking
            )
            du = system.beta * right
            recalled = -_linked(enter, du)
            d_recalling = _dot(recalled, S, COLUMNS)
            entered += _sums(wide_k * d_recalling)
            pairs += system.beta * system.among * dA
            d_products = _linked(between, system.beta * dA)
            dk += d_recalling + _dot(d_products, wide_k)
            dk += _dot(d_products, wide_k, TURNED)
            increment += _dot(_reached(enter, wide_k), recalled, TURNED)
        through = jnp.sum(S * dS, keepdims=True).reshape(1, 1)
        through = _linked(decays.through, through)
        d_rows_ref[head, 0:1, :] = _of_decays(pairs, entered, left) + through
        d_queries[group] += dq + _dot(d_scores, k)
        d_keys[group] += dk
        d_values.append(du)
        carry[head] = _linked(decays.through, dS) + increment
    dq_ref[...] = _side_by_side(d_queries).astype(dq_ref.dtype)
    dk_ref[...] = _side_by_side(d_keys).astype(dk_ref.dtype)
    dv_ref[...] = _side_by_side(d_values).astype(dv_ref.dtype)
    d_state_ref[...] = carry[...]


def _of_decays(pairs, entered, left):
    """The gradient of g, a row, from the decays' times these: between pairs of tokens,
    of the state that enters, and of the one that leaves.

    g of step t is in the decay from j to i where j < t <= i. Summed as that:
    differences of sums would lose what is small.
    """
    until = (_steps(0) <= _steps(1)).astype(pairs.dtype)  # [t, i]
    before = (_steps(1) < _steps(0)).astype(pairs.dtype)  # [t, j]
    inner = _sums(before * _dot(until, pairs))
    return inner + _dot(entered, until, COLUMNS) + _dot(left, before, COLUMNS)


def _sums(x):
    """The sums of the rows of x [T, *], as a row [1, T]."""
    return _dot(jnp.ones((1, x.shape[1]), x.dtype), x, COLUMNS)
