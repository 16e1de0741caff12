"""ListOps expressions as tokens: drawing them, evaluating them.

[MAX 4 [MIN 2 3 ] 9 ] has the tokens [MAX, 4, [MIN, 2, 3, ], 9, ] and the value 9. An
operator is MIN, MAX, MED (the median, cut to a whole number) or SM (the sum modulo 10).
Trees are drawn breadth first, many at once, each depth as a few array operations.
"""

import collections
import concurrent.futures
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

DIGITS = 10
OPERATORS = ("MIN", "MAX", "MED", "SM")
SYMBOLS = (*map(str, range(DIGITS)), *(f"[{name}" for name in OPERATORS), "]")
SPECIALS = ("<pad>", "<unk>", "<eos>")
PAD, UNKNOWN, EOS = range(len(SPECIALS))  # UNKNOWN: part of the usual 18, never met
TOKENS = {symbol: len(SPECIALS) + i for i, symbol in enumerate(SYMBOLS)}
ZERO, OPEN, CLOSE = TOKENS["0"], TOKENS["[MIN"], TOKENS["]"]
VOCAB_SIZE = len(SPECIALS) + len(SYMBOLS)

OPERATOR_PROBABILITY = 0.25
TOKENS_AT_ONCE = 2**20  # bounds the memory of a draw
BARREN_DRAWS = 50  # in a row without a new expression, until there seem to be no more


class Rules(NamedTuple):
    """Which expressions there are: lengths between, but not equal to, the first two;
    the depth counts the root; an operator has 2 to `max_args` arguments."""

    min_length: int
    max_length: int
    max_depth: int
    max_args: int


class _Level(NamedTuple):
    """The nodes of one depth, in the order of their parents; [n] each."""

    tree: np.ndarray  # index of the tree
    children: np.ndarray  # 0: a digit
    symbol: np.ndarray  # the digit, or the operator's index

    @property
    def starts(self):
        """Index in the next level of every operator's first child."""
        counts = self.children[self.children > 0]
        return np.cumsum(counts) - counts


def distinct(rules: Rules, seed: int, workers: int = 0) -> Iterator[tuple[int, bytes]]:
    """Draws (value, tokens as bytes) without end and without repetition.

    Args:
        rules: of the expressions.
        seed: of the draw; the expressions do not depend on `workers`.
        workers: threads; 0: one for each processor.

    Raises:
        ValueError: no expression is left, or none can be found.
    """
    texts, barren = set(), 0
    for expressions in _draws(rules, seed, workers or os.cpu_count() or 1):
        barren += 1
        for value, tokens in expressions:
            if tokens not in texts:
                barren = 0
                texts.add(tokens)
                yield value, tokens
        if barren == BARREN_DRAWS:
            raise ValueError(
                f"only {len(texts)} different expressions were found with data."
                + ", data.".join(f"{k}={v}" for k, v in rules._asdict().items())
                + ": ask for fewer examples or widen these"
            )


def _draws(rules, seed, workers) -> Iterator[list[tuple[int, bytes]]]:
    """The draws 0, 1, 2, ... in order, some of them prepared ahead by threads: NumPy
    lets others run while it computes."""
    waiting = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for number in itertools.count():
            waiting.append(pool.submit(draw, rules, seed, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def draw(rules: Rules, seed: int, number: int) -> list[tuple[int, bytes]]:
    """(value, tokens) of those trees of draw `number` whose lengths the rules allow."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    levels, lengths = _trees(rng, rules, -(-TOKENS_AT_ONCE // rules.max_length))
    mask = (rules.min_length < lengths) & (lengths < rules.max_length)
    levels = [_Level(*(field[mask[level.tree]] for field in level)) for level in levels]
    sizes, values = _sizes_and_values(levels)
    tokens = _tokens(levels, sizes).astype(np.uint8).tobytes()
    ends = np.cumsum(sizes[0]).tolist()
    return [
        (value, tokens[end - size : end])
        for value, size, end in zip(
            values[0].tolist(), sizes[0].tolist(), ends, strict=True
        )
    ]


def _trees(rng, rules: Rules, count: int) -> tuple[list[_Level], np.ndarray]:
    """`count` trees and their lengths; one that gets too long stops growing."""
    tree, lengths, levels = np.arange(count), np.ones(count, np.int64), []
    for depth in range(1, rules.max_depth + 1):
        n = len(tree)
        # A digit alone is never long enough: every root is an operator.
        probability = 1.0 if depth == 1 else OPERATOR_PROBABILITY
        operator = rng.random(n) < probability * (depth < rules.max_depth)
        children = rng.integers(2, rules.max_args, n, endpoint=True) * operator
        digit, name = rng.integers(DIGITS, size=n), rng.integers(len(OPERATORS), size=n)
        # A node counted 1 so far; every child will have one token or more.
        grown = lengths + np.bincount(tree, children + operator, count).astype(int)
        children *= (grown < rules.max_length)[tree]
        levels.append(_Level(tree, children, np.where(operator, name, digit)))
        lengths, tree = grown, np.repeat(tree, children)
    return levels, lengths


def _sizes_and_values(levels: list[_Level]):
    """For every level, its nodes' lengths in tokens and their values."""
    sizes, values = [], []
    for level in reversed(levels):
        operator = level.children > 0
        size, value = np.ones_like(level.children), level.symbol.copy()
        if operator.any():
            starts = level.starts
            size[operator] = 2 + np.add.reduceat(sizes[-1], starts)
            results = _operations(values[-1], starts, level.children[operator])
            value[operator] = np.choose(level.symbol[operator], results)
        sizes.append(size)
        values.append(value)
    return sizes[::-1], values[::-1]


def _operations(values, starts, counts) -> tuple[np.ndarray, ...]:
    """Each of OPERATORS over the segments of `values`."""
    segment = np.repeat(np.arange(len(counts)), counts)
    ordered = values[np.lexsort((values, segment))]
    middle = ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]
    return (
        ordered[starts],
        ordered[starts + counts - 1],
        middle // 2,
        np.add.reduceat(values, starts) % DIGITS,
    )


def _tokens(levels: list[_Level], sizes) -> np.ndarray:
    """All trees depth first, one after another."""
    tokens = np.empty(sizes[0].sum(), np.int64)
    position = np.cumsum(sizes[0]) - sizes[0]
    for depth, level in enumerate(levels):
        operator = level.children > 0
        tokens[position] = level.symbol + np.where(operator, OPEN, ZERO)
        if not operator.any():
            break
        opened = position[operator]
        tokens[opened + sizes[depth][operator] - 1] = CLOSE
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
        first = opened + 1 - before[level.starts]
        position = before + np.repeat(first, level.children[operator])
    return tokens


_BY_TOKEN: dict[int, Callable[[Sequence[int]], int]] = {
    TOKENS["[MIN"]: min,
    TOKENS["[MAX"]: max,
    TOKENS["[MED"]: lambda xs: int(statistics.median(xs)),
    TOKENS["[SM"]: lambda xs: sum(xs) % DIGITS,
}


def value(tokens: Sequence[int]) -> int:
    """The value of one expression, token by token: a check of what came from elsewhere.

    Raises:
        ValueError: not an expression.
    """
    arguments, operators = [[]], []
    for token in tokens:
        if token in _BY_TOKEN:
            operators.append(_BY_TOKEN[token])
            arguments.append([])
        elif token != CLOSE:
            arguments[-1].append(token - ZERO)
        elif operators and arguments[-1]:
            value = operators.pop()(arguments.pop())
            arguments[-1].append(value)
        else:
            raise ValueError("']' closes nothing")
    if operators or len(arguments[0]) != 1:
        raise ValueError(f"{len(operators)} lists are open, {len(arguments[0])} values")
    return arguments[0][0]
