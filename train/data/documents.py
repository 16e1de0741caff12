"""Texts as tokens, as two traditions of the Long Range Arena have them.

"lra" (https://github.com/google-research/long-range-arena) reads bytes of UTF-8, a byte
b as the token b + 1, cut at the length. "s4" (https://github.com/state-spaces/s4) reads
characters, those that the training texts have often enough, in the order of their code
points; it cuts a text one token earlier and ends it with EOS. Both fill up with PAD,
which is masked.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from train.data.spec import Spec

VARIANTS = ("lra", "s4")

SPECIALS = ("<pad>", "<unk>", "<eos>")
PAD, UNKNOWN, EOS = range(len(SPECIALS))
BYTES = 256


class Alphabet(NamedTuple):
    """What texts are read by.

    Attributes:
        codes: int [K], sorted code points of the characters that have a token; None
            where bytes are read.
        length: tokens of a text.
    """

    codes: np.ndarray | None
    length: int

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        if self.codes is None:
            return 1 + BYTES
        return len(SPECIALS) + len(self.codes)

    @property
    def symbols(self) -> tuple[str, ...]:
        """What each token stands for."""
        if self.codes is None:
            shown = (chr(b) if 32 <= b < 127 else f"<{b:02x}>" for b in range(BYTES))
            return (SPECIALS[PAD], *shown)
        return (*SPECIALS, *map(chr, self.codes))

    def read(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens int32 [length] of a text in UTF-8, and which are real, bool."""
        if self.codes is None:
            tokens = np.frombuffer(text[: self.length], np.uint8).astype(np.int32) + 1
        else:
            characters = text.decode("utf-8", "replace")[: self.length - 1]
            codes = np.frombuffer(characters.encode("utf-32-le", "replace"), "<u4")
            at, known = np.searchsorted(self.codes, codes), np.isin(codes, self.codes)
            tokens = np.append(np.where(known, len(SPECIALS) + at, UNKNOWN), EOS)
        inputs = np.full(self.length, PAD, np.int32)
        inputs[: len(tokens)] = tokens
        return inputs, np.arange(self.length) < len(tokens)

    def spec(self, classes: tuple[str, ...]) -> Spec:
        """What a data set of such texts says of itself."""
        return Spec(
            encoder="token",
            length=self.length,
            outputs=len(classes),
            loss="classification",
            vocab_size=self.vocab_size,
            padded=True,
            symbols=self.symbols,
            classes=classes,
        )


def alphabet(variant: str, counts: Mapping[str, int], least: int, length: int):
    """That of one of VARIANTS.

    Args:
        variant: which tradition.
        counts: how often the training texts have each character.
        least: as often as a character must occur there to have a token.
        length: tokens of a text.
    """
    if variant == "lra":
        return Alphabet(None, length)
    codes = sorted(ord(character) for character, n in counts.items() if n >= least)
    return Alphabet(np.array(codes), length)


def count(texts: Iterable[bytes]) -> dict[str, int]:
    """How often texts in UTF-8 have each character."""
    counts = Counter()
    for text in texts:
        counts.update(text.decode("utf-8", "replace"))
    return dict(sorted(counts.items()))
