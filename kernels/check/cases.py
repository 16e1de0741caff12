"""The inputs of each operation, for its check, its benchmark and its tests.

`OPERATIONS` says per operation which variants there are and how their inputs are made.
A `Case` is one variant at one length with or without initial state, resets and reverse;
the product of all of them by dtype is what `python -m kernels.check` covers.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels import (
    block_sizes,
    butterfly_conv,
    cauchy,
    chunked_scan,
    contracted_scan,
    fft_conv,
    linear_scan,
    selective_scan,
    short_conv,
    vandermonde,
    vandermonde_transpose,
)

LONGEST_FILTER = 2048  # taps: the definition keeps L x K values for its gradient
DTYPES = ("float32", "bfloat16", "float64")
LONGEST_DECAY = 1000
# In `Operation.shapes`; neither these nor one less is any other axis.
STANDS_FOR_LENGTH, STANDS_FOR_TAPS = 13, 11


class Case(NamedTuple):
    """One variant of an operation at one length, with these options."""

    variant: str
    length: int
    state: bool = False
    reset: bool = False
    reverse: bool = False

    def __str__(self):
        options = [name for name in self._fields[2:] if getattr(self, name)]
        return ", ".join([self.variant, f"L={self.length}", *options])


@dataclass(frozen=True)
class Operation:
    """One public operation.

    `make(rng, variant, length, size)` gives all its arrays, with the initial state and
    the resets where the variant takes them; `static(case)` its other arguments;
    `variants` are those that are checked; `small` are sizes for computing, `wide` and
    `length` those of real work, for compiling only; beyond `longest` the definition
    takes too much memory.
    """

    call: Callable
    make: Callable[[np.random.Generator, str, int, dict], dict]
    variants: tuple[str, ...]
    small: dict[str, int]
    wide: dict[str, int]
    static: Callable[[Case], dict[str, Any]]
    length: int = 4096
    longest: int = 2**20

    @property
    def name(self) -> str:
        return self.call.__name__

    @property
    def folder(self) -> str:
        """Of its sources, below kernels/."""
        return self.call.__module__.removeprefix("kernels.").split(".")[0]

    @property
    def backends(self) -> dict:
        return sys.modules[self.call.__module__].BACKENDS

    def inputs(self, case: Case, **sizes: int) -> dict:
        """The arrays of a case, in float64, of these sizes instead of its own."""
        rng = np.random.default_rng(case.length)
        arrays = self.make(rng, case.variant, case.length, self.small | sizes)
        return self._taken(case, arrays)

    def shapes(self, case: Case, **sizes: int) -> dict:
        """What `inputs` would be at wide sizes, without a number: their shapes and
        dtypes. Small arrays are made whose axes stand for long ones."""
        size = self.wide | sizes
        true = {STANDS_FOR_LENGTH: case.length, STANDS_FOR_LENGTH - 1: case.length - 1}
        longest = size.get("K", min(case.length, LONGEST_FILTER))  # of a filter
        if self.folder == "fft_conv":
            true |= {STANDS_FOR_TAPS: longest, STANDS_FOR_TAPS - 1: longest - 1}
            size["K"] = STANDS_FOR_TAPS
        if {*size.values()} & {*true} - {STANDS_FOR_TAPS}:
            raise ValueError(f"sizes must be none of {sorted(true)}, got {size}")
        rng = np.random.default_rng(0)
        made = self.make(rng, case.variant, STANDS_FOR_LENGTH, size)
        arrays = self._taken(case, made)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct([true.get(n, n) for n in x.shape], x.dtype),
            arrays,
        )
        for name in {"u_factors", "k_factors"} & {*shapes}:
            heads = shapes[name][0].shape[:-3]
            shapes[name] = [
                jax.ShapeDtypeStruct((*heads, n, n, 2), np.float64)
                for n in block_sizes(case.length + longest)
            ]
        return shapes

    def _taken(self, case, arrays):
        included = {"initial_state": case.state, "reset": case.reset}
        return {k: x for k, x in arrays.items() if included.get(k, True)}

    def product(self, lengths, dtypes, wide: bool = False) -> Iterator[tuple]:
        """All (variant, length, state, reset, reverse, dtype); the first is the case
        with every option. Long ones only if the definition is not needed (`wide`)."""
        for variant in self.variants:
            arrays = self.make(np.random.default_rng(0), variant, 1, self.small)
            real = any(x.dtype.kind == "f" for x in jax.tree.leaves(arrays))
            yield from itertools.product(
                [variant],
                [length for length in lengths if length <= self.longest or wide],
                (True, False) if "initial_state" in arrays else (False,),
                (True, False) if "reset" in arrays else (False,),
                (True, False) if "reset" in arrays else (False,),
                # what is complex alone has no bfloat16
                [dtype for dtype in dtypes if real or dtype != "bfloat16"],
            )


def covering(candidates: list[tuple], strength: int = 2) -> list[tuple]:
    """Few of the candidates that show every two (`strength`) of their values together.

    Greedy: the next one shows the most that was not seen yet, the first of several.
    """
    combinations = {
        c: set(itertools.combinations(enumerate(c), strength)) for c in candidates
    }
    uncovered, cover = set().union(*combinations.values()), []
    while uncovered:
        cover.append(max(candidates, key=lambda c: len(combinations[c] & uncovered)))
        uncovered -= combinations[cover[-1]]
    return cover


# Inputs. The total decay of a long call is not so small that float32 has only 0 for it.


def _mild(length):
    return min(1, 30 / length)


def normal(rng, *shape, kind="r"):
    """Standard normal numbers; kind "r" is real, "c" complex."""
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if kind == "c" else x


def _resets(rng, B, L):
    return rng.uniform(size=(B, L)) < 0.15


def _scan(rng, variant, length, size):
    B, D = size["B"], size["D"]
    shape, kinds, a_shape = (B, length, D), "rr", None
    if variant == "broadcast a":  # one decay for each of the heads
        shape, a_shape = (B, length, D // 5, 5), (B, length, D // 5, 1)
    elif variant == "constant a":
        kinds, a_shape = "cc", (D,)
    else:
        kinds = {"real": "rr", "complex": "cc", "complex a": "cr", "complex x": "rc"}[
            variant
        ]
    a = rng.uniform(0.3, 0.999, a_shape or shape) ** _mild(length)
    if kinds[0] == "c":
        a = a * np.exp(1j * rng.uniform(-3, 3, a.shape))
    return {
        "a": a,
        "x": normal(rng, *shape, kind=kinds[1]),
        "initial_state": normal(rng, B, *shape[2:], kind="c" if "c" in kinds else "r"),
        "reset": _resets(rng, B, length),
    }


def _bank(rng, variant, length, size):
    B, H, N = size["B"], size["H"], size["N"]
    kind, timed = variant[0], variant.endswith("dt")
    log_a = -rng.uniform(0.01, 0.5, (H, N)) * _mild(length)
    if kind == "c":
        # with dt the phase dt * Im(log_a) is rounded in the inputs' precision
        log_a = log_a + 1j * rng.uniform(-1, 1, (H, N)) * (
            0.5 * _mild(length) if timed else 3
        )
    arrays = {
        "log_a": log_a,
        "b": normal(rng, H, N, kind=kind),
        "c": normal(rng, H, N, kind=kind),
        "u": normal(rng, B, length, H),
        "initial_state": normal(rng, B, H, N, kind=kind),
        "reset": _resets(rng, B, length),
    }
    if timed:
        # as often whole steps, also none
        dt = rng.uniform(0, 3, (B, length))
        arrays["dt"] = np.where(rng.uniform(size=dt.shape) < 0.5, np.floor(dt), dt)
    return arrays


def _selective(rng, variant, length, size):
    B, D, N = size["B"], size["D"], size["N"]
    arrays = {
        "u": normal(rng, B, length, D),
        "dt": rng.uniform(0.01, 0.5, (B, length, D)),
        "A": -rng.uniform(0.1, 2, (D, N)) * _mild(length),
        "B": normal(rng, B, length, N),
        "C": normal(rng, B, length, N),
        "initial_state": normal(rng, B, D, N),
        "reset": _resets(rng, B, length),
    }
    if variant == "skip":
        arrays["skip"] = normal(rng, D)
    return arrays


def _chunked(rng, variant, length, size):
    B, H, G, K, V = (size[name] for name in "BHGKV")
    k = normal(rng, B, length, G, K)
    arrays = {
        "q": normal(rng, B, length, G, K) / np.sqrt(K),
        # the delta rule is stable for beta |k|^2 <= 2
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(rng, B, length, H, V),
        "initial_state": normal(rng, B, H, K, V),
        "reset": _resets(rng, B, length),
    }
    # also "no decay" and "delta rule, no decay"
    decays = {"constant": (H,), "scalar": (B, length, H), "vector": (B, length, H, K)}
    *rule, decay = variant.removesuffix(" decay").split(", ")
    strong = decay.startswith("strong ")
    if decay != "no":
        shape = decays[decay.removeprefix("strong ")]
        decay = rng.uniform(16, 17, shape) if strong else rng.uniform(0.01, 1, shape)
        arrays["log_decay"] = -decay * (1 if strong else _mild(length))
    if rule == ["delta rule"]:
        arrays["beta"] = rng.uniform(0.1, 1, (B, length, H)) * _mild(length)
    return arrays


def _convolution(rng, variant, length, size):
    B, H = size["B"], size["H"]
    longest = size.get("K", min(length, LONGEST_FILTER))
    taps = 17 if variant == "short filter" else longest
    decay = np.exp(-np.arange(taps) / 20)
    arrays = {
        "u": normal(rng, B, length, H),
        "k": normal(rng, H, taps) * decay,
        "initial_state": normal(rng, B, taps - 1, H),
        "reset": _resets(rng, B, length),
    }
    if variant in ("gated", "two-sided"):
        arrays["skip"] = normal(rng, H)
        arrays["pre_gate"] = normal(rng, B, length, H)
        arrays["post_gate"] = normal(rng, B, length, H)
    if variant == "two-sided":
        arrays["k_reverse"] = normal(rng, H, taps) * decay
        del arrays["initial_state"]
    return arrays


def _butterfly(rng, variant, length, size):
    B, H = size["B"], size["H"]
    taps = min(length, size["K"])
    arrays = {
        "u": normal(rng, B, length, H),
        "k": normal(rng, H, taps) * np.exp(-np.arange(taps) / 20),
        "skip": normal(rng, H),
    }
    if variant == "two-sided":
        arrays["k_reverse"] = normal(rng, H, taps)
    heads = (H,) if variant == "factors per channel" else ()
    for name in ("u_factors", "k_factors"):
        arrays[name] = [
            _learned(rng, n, heads) for n in block_sizes(length + size["K"])
        ]
    return arrays


def _learned(rng, n, heads):
    """[*heads, n, n, 2], not far from the factor of a Fourier transform."""
    angle = -2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
    pair = np.stack([np.cos(angle), np.sin(angle)], -1)
    return pair + 0.1 * rng.standard_normal((*heads, *pair.shape))


def _short(rng, variant, length, size):
    B, H, W = size["B"], size["H"], size["W"]
    arrays = {
        "u": normal(rng, B, length, H),
        "w": normal(rng, H, W),
        "initial_state": normal(rng, B, W - 1, H),
        "reset": _resets(rng, B, length),
    }
    if variant == "bias":
        arrays["bias"] = normal(rng, H)
    return arrays


def nodes(rng, variant, size):
    """log_z [H, N], slowly decaying; up to beyond Nyquist where it is complex."""
    log_z = -rng.uniform(0.001, 0.5, (size["H"], size["N"]))
    if variant == "real":
        return log_z
    return log_z + 1j * rng.uniform(-3.2, 3.2, log_z.shape)


def _filter(rng, variant, length, size):
    kind = "r" if variant in ("real", "real c") else "c"
    return {
        "c": normal(rng, size["R"], size["H"], size["N"], kind=kind),
        "log_z": nodes(rng, variant, size),
    }


def _moments(rng, variant, length, size):
    return {
        "u": normal(rng, size["B"], size["H"], length),
        "log_z": nodes(rng, variant, size),
    }


def _cauchy(rng, variant, length, size):
    H, N = size["H"], size["N"]
    dt = 10 ** rng.uniform(-3, -1, (H, 1))
    sums = {"one sum": 1, "shared nodes": 4}[variant]
    return {
        "v": normal(rng, sums, H, N, kind="c"),
        "z": dt * (-0.5 + 1j * np.arange(1, N + 1) ** 2),
    }


def _scan_options(case):
    # rounding a decay moves its L-th power L times as far: too far for a long call
    # and float32 has only 0 for that of a strong decay
    transition = case.length <= LONGEST_DECAY and "strong" not in case.variant
    return {"reverse": case.reverse, "return_transition": transition}


def _direction(case):
    return {"reverse": case.reverse}


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            linear_scan,
            _scan,
            ("real", "complex", "complex a", "complex x", "constant a", "broadcast a"),
            {"B": 2, "D": 10},
            {"B": 8, "D": 256},
            _scan_options,
        ),
        Operation(
            contracted_scan,
            _bank,
            ("complex", "real", "complex, dt", "real, dt"),
            {"B": 2, "H": 4, "N": 3},
            {"B": 2, "H": 256, "N": 32},
            _scan_options,
        ),
        Operation(
            selective_scan,
            _selective,
            ("skip", "no skip"),
            {"B": 2, "D": 5, "N": 4},
            {"B": 8, "D": 1536, "N": 16},
            _scan_options,
            length=2048,
        ),
        Operation(
            chunked_scan,
            _chunked,
            (
                "scalar decay",
                "delta rule, scalar decay",
                "vector decay",
                "delta rule, vector decay",
                "constant decay",
                "delta rule, no decay",
                "strong scalar decay",
                "delta rule, strong scalar decay",
            ),
            {"B": 2, "H": 2, "G": 1, "K": 5, "V": 3},
            {"B": 4, "H": 8, "G": 8, "K": 64, "V": 64},
            _scan_options,
            length=2048,
        ),
        Operation(
            fft_conv,
            _convolution,
            ("gated", "no gates", "two-sided", "short filter"),
            {"B": 2, "H": 3},
            {"B": 4, "H": 256, "K": 8192},
            _direction,
            length=8192,
        ),
        Operation(
            butterfly_conv,
            _butterfly,
            ("one-sided", "two-sided", "factors per channel"),
            {"B": 2, "H": 2, "K": 20},
            {"B": 2, "H": 64, "K": 4096},
            lambda case: {},
            longest=1000,
        ),
        Operation(
            short_conv,
            _short,
            ("bias", "no bias"),
            {"B": 2, "H": 5, "W": 4},
            {"B": 8, "H": 1536, "W": 4},
            _direction,
        ),
        Operation(
            vandermonde,
            _filter,
            ("complex", "real", "real c"),
            {"R": 2, "H": 3, "N": 5},
            {"R": 2, "H": 128, "N": 32},
            lambda case: {"length": case.length},
            length=16384,
        ),
        Operation(
            vandermonde_transpose,
            _moments,
            ("complex", "real"),
            {"B": 2, "H": 3, "N": 5},
            {"B": 4, "H": 128, "N": 32},
            lambda case: {},
            length=8192,
        ),
        Operation(
            cauchy,
            _cauchy,
            ("shared nodes", "one sum"),
            {"H": 3, "N": 5},
            {"H": 128, "N": 32},
            lambda case: {"length": case.length},
            length=16384,
        ),
    )
}
