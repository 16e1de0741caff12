"""Tests of memory that are drawn on the fly: recall, copying, induction, a pass key.

A target is what to answer once its token was read; wherever nothing is asked it is -1,
which has no weight.
"""

import functools

import numpy as np

from train.data import checks, pipeline
from train.data.sources import SPLITS, Example, drawn_splits
from train.data.spec import Spec

IGNORED = -1  # as in train.losses, which would bring JAX into every worker process
TRAIN = 100_000_000  # more than a run reads: no example comes twice
HELD_OUT = 1_000

PROMPT = b"A pass key is hidden in this text. Find it and remember it.\n"
FILLER = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    b"back again.\n"
)
STATED = b"The pass key is %b. Remember it. %b is the pass key.\n"
QUESTION = b"What is the pass key? The pass key is "
BYTES = 256


def mqar(
    length: int = 256,
    vocab_size: int = 8_192,
    pairs: int = 16,
    power: float = 0.01,
    random_filler: bool = False,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """Multi-query associative recall (https://arxiv.org/abs/2312.04927).

    K different keys in [1, V/2), each followed by its value in [V/2, V), all different
    too; then slots of two tokens, in K of which one of the keys stands first: its
    target is its value. Slot g = 1, 2, ... is chosen with a probability in proportion
    to g^(power - 1), without replacement, so most queries come soon.

    Args:
        length: L, even and at least 4 K.
        vocab_size: V.
        pairs: K.
        power: 1 spreads the queries evenly.
        random_filler: tokens of the slots that ask nothing are drawn from all V; else
            they are 0.
        train, validation, test: numbers of examples; 0: no such split.
        seed: of the data, not of the run.

    Raises:
        ValueError: a setting that cannot be.
    """
    checks.at_least("pairs", pairs, 1)
    checks.at_least("length", length, 4 * pairs, "4 data.pairs")
    checks.at_least("vocab_size", vocab_size, 2 * (pairs + 1), "2 (data.pairs + 1)")
    if length % 2:
        raise ValueError(f"data.length must be even, got {length}")
    if not 0 < power <= 1:
        raise ValueError(f"data.power must lie in (0, 1], got {power}")
    draw = functools.partial(
        _mqar,
        length=length,
        vocab_size=vocab_size,
        pairs=pairs,
        power=power,
        random_filler=random_filler,
    )
    return _dataset(draw, length, vocab_size, (train, validation, test), seed)


def _mqar(rng, length, vocab_size, pairs, power, random_filler):
    half = vocab_size // 2
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(vocab_size - half, pairs, replace=False)
    slots = np.arange(1, (length - 2 * pairs) // 2 + 1)
    weights = slots ** (power - 1.0)
    chosen = rng.choice(slots, pairs, replace=False, p=weights / weights.sum())
    inputs, targets = np.zeros(length, np.int64), np.full(length, IGNORED)
    if random_filler:
        inputs = rng.integers(vocab_size, size=length)
    inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
    asked = 2 * pairs + 2 * (chosen - 1)
    inputs[asked], targets[asked] = keys, values
    return inputs, targets


def copying(
    length: int = 1_024,
    vocab_size: int = 16,
    tokens: int = 16,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """K tokens, a pause, and K marks at which to repeat them in order
    (https://doi.org/10.1162/neco.1997.9.8.1735, https://arxiv.org/abs/1511.06464).

    Tokens are uniform in [1, V - 1), the pause is 0, the mark V - 1. A fixed delay
    solves it.

    Args:
        length: L, marks included; at least 2 K.
        vocab_size: V, pause and mark included.
        tokens: K.
        train, validation, test: numbers of examples; 0: no such split.
        seed: of the data, not of the run.

    Raises:
        ValueError: a setting that cannot be.
    """
    _check_copying(length, vocab_size, tokens)
    draw = functools.partial(
        _copying, length=length, vocab_size=vocab_size, tokens=tokens
    )
    return _dataset(draw, length, vocab_size, (train, validation, test), seed)


def selective_copying(
    length: int = 4_096,
    vocab_size: int = 16,
    tokens: int = 16,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """As `copying`, but the tokens stand anywhere before the marks, in random places
    among the 0 (https://arxiv.org/abs/2312.00752): what to keep depends on the input.
    """
    _check_copying(length, vocab_size, tokens)
    draw = functools.partial(
        _selective_copying, length=length, vocab_size=vocab_size, tokens=tokens
    )
    return _dataset(draw, length, vocab_size, (train, validation, test), seed)


def _check_copying(length, vocab_size, tokens):
    checks.at_least("tokens", tokens, 1)
    checks.at_least("length", length, 2 * tokens, "2 data.tokens")
    checks.at_least("vocab_size", vocab_size, 4, "two tokens, the pause and the mark")


def _copying(rng, length, vocab_size, tokens):
    return _repeat(rng, np.arange(tokens), length, vocab_size)


def _selective_copying(rng, length, vocab_size, tokens):
    places = rng.choice(length - tokens, tokens, replace=False)
    return _repeat(rng, np.sort(places), length, vocab_size)


def _repeat(rng, places, length, vocab_size):
    copied = rng.integers(1, vocab_size - 1, size=len(places))
    inputs, targets = np.zeros(length, np.int64), np.full(length, IGNORED)
    inputs[places] = copied
    inputs[-len(places) :], targets[-len(places) :] = vocab_size - 1, copied
    return inputs, targets


def induction(
    length: int = 256,
    vocab_size: int = 16,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """Random tokens in [0, V - 1), among them once the trigger V - 1, which also ends
    the sequence: the target there is the token that followed it the first time
    (https://arxiv.org/abs/2212.14052, https://arxiv.org/abs/2312.00752).

    Args:
        length: L, at least 3.
        vocab_size: V, the trigger included.
        train, validation, test: numbers of examples; 0: no such split.
        seed: of the data, not of the run.

    Raises:
        ValueError: a setting that cannot be.
    """
    checks.at_least("length", length, 3)
    checks.at_least("vocab_size", vocab_size, 3, "two tokens and the trigger")
    draw = functools.partial(_induction, length=length, vocab_size=vocab_size)
    return _dataset(draw, length, vocab_size, (train, validation, test), seed)


def _induction(rng, length, vocab_size):
    inputs = rng.integers(vocab_size - 1, size=length)
    place = rng.integers(length - 2)
    inputs[[place, -1]] = vocab_size - 1
    targets = np.full(length, IGNORED)
    targets[-1] = inputs[place + 1]
    return inputs, targets


def passkey(
    length: int = 1_024,
    digits: int = 5,
    train: int = TRAIN,
    validation: int = HELD_OUT,
    test: int = HELD_OUT,
    seed: int = 0,
) -> pipeline.Dataset:
    """A number that is stated once in a text of no interest and asked for at its end,
    byte by byte (https://arxiv.org/abs/2305.16300, https://arxiv.org/abs/2410.07145).

    A prompt, sentences that repeat, in place of one repetition the number, then the
    question and the answer, whose digits are the targets. Place and digits are uniform.
    With all digits right, greedy decoding is right too: `sequence_accuracy` is the
    score of the papers.

    Args:
        length: L in bytes; the first repetition is cut to fit.
        digits: of the number.
        train, validation, test: numbers of examples; 0: no such split.
        seed: of the data, not of the run.

    Raises:
        ValueError: a setting that cannot be.
    """
    checks.at_least("digits", digits, 1)
    stated = len(STATED % (b"", b"")) + 2 * digits
    fixed = len(PROMPT) + stated + len(QUESTION) + digits - 1
    checks.at_least("length", length, fixed, "the text without its filling")
    draw = functools.partial(_passkey, room=length - fixed, digits=digits)
    sizes = train, validation, test
    symbols = [chr(i) if chr(i).isprintable() else f"\\x{i:02x}" for i in range(BYTES)]
    more = dict(symbols=tuple(symbols), causal=True)
    return _dataset(draw, length, BYTES, sizes, seed, **more)


def _passkey(rng, room, digits):
    number = bytes(b"0"[0] + rng.integers(10, size=digits, dtype=np.uint8))
    blocks, remainder = divmod(room, len(FILLER))
    before = rng.integers(blocks + 1)
    text = PROMPT + FILLER[len(FILLER) - remainder :] + before * FILLER
    text += STATED % (number, number) + (blocks - before) * FILLER + QUESTION + number
    read = np.frombuffer(text, np.uint8).astype(np.int64)
    targets = np.full(len(read) - 1, IGNORED)
    targets[-digits:] = read[-digits:]
    return read[:-1], targets


def _dataset(draw, length, vocab_size, sizes, seed, **more) -> pipeline.Dataset:
    example = functools.partial(_example, draw=draw)
    draws = dict.fromkeys(SPLITS, example)
    spec = Spec(
        encoder="token",
        length=length,
        channels=1,
        vocab_size=vocab_size,
        outputs=vocab_size,
        loss="token",
        padded=False,
        **more,
    )
    return pipeline.Dataset(spec, drawn_splits(draws, sizes, seed))


def _example(rng, draw) -> Example:
    inputs, targets = draw(rng)
    return {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "mask": np.ones(len(inputs), bool),
    }
