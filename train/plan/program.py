"""What the text of a compiled program (HLO, as `jax.stages.Compiled.as_text` gives it)
says: its collectives, its calls of our kernels, and how often a step runs each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What Pallas and jax-triton call their kernels.
KERNELS = ("tpu_custom_call", "triton_kernel_call", "__gpu$xla.gpu.triton")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_SEVERAL = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")


@dataclass(frozen=True)
class Runs:
    """How often a step runs something.

    Attributes:
        count: times; a loop of unknown length counts once.
        exact: whether no such loop is around it.
    """

    count: int = 1
    exact: bool = True


@dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange arrays.

    Attributes:
        kind: one of COLLECTIVES.
        size: bytes, of what one device gives or of what it gets, the larger, each time.
        runs: times in a step.
        source: where in the model it comes from, as JAX names it; "" where that is not
            said.
    """

    kind: str
    size: int
    runs: Runs
    source: str

    @property
    def bytes_per_step(self) -> int:
        """Of one device."""
        return self.size * self.runs.count


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape operation(operands), rest`."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool  # what its computation returns


class Program:
    """The computations of a text in HLO, in their order: who is called stands before
    who calls."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        for line in text.splitlines():
            if not line.startswith((" ", "}")) and (head := _COMPUTATION.match(line)):
                inside = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                one = _instruction(*found.groups())
                if one is not None and self._computations:
                    inside[one.name] = one
        self._runs = self._counted()

    def collectives(self) -> list[Collective]:
        """All of them, those that a step spends the most bytes on first."""
        found = [
            Collective(kind, _exchanged(one, kind, inside), runs, _source(one))
            for one, inside, runs in self._instructions()
            for kind in COLLECTIVES
            if one.operation in (kind, f"{kind}-start")
        ]
        return sorted(found, key=lambda one: -one.bytes_per_step)

    def kernels(self) -> list[Runs]:
        """Of every call of one of our kernels."""
        targets = [f'custom_call_target="{name}"' for name in KERNELS]
        return [
            runs
            for one, _, runs in self._instructions()
            if one.operation == "custom-call" and any(t in one.rest for t in targets)
        ]

    def loops(self) -> bool:
        """Whether a step has any loop."""
        return any(one.operation == "while" for one, _, _ in self._instructions())

    def _instructions(self) -> Iterator[tuple[Instruction, dict, Runs]]:
        for name, inside in self._computations.items():
            # Whoever calls it in a way that is not read here is one who does.
            runs = self._runs.get(name, Runs(1, False))
            for one in inside.values():
                yield one, inside, runs

    def _counted(self) -> dict[str, Runs]:
        """Computation -> how often a step runs it; of a condition every branch."""
        runs = {self._entry: Runs()} if self._entry else {}
        for name in reversed(self._computations):
            around = runs.get(name, Runs(1, False))
            for one in self._computations[name].values():
                trips = self._trips(one, self._computations[name])
                for called in _called(one):
                    looped = trips if one.operation == "while" else Runs()
                    before = runs.get(called, Runs(0))
                    runs[called] = Runs(
                        before.count + around.count * looped.count,
                        before.exact and around.exact and looped.exact,
                    )
        return runs

    def _trips(self, loop: Instruction, inside: dict) -> Runs:
        """Of a `while`: what the compiler has noted, else by the bound in its condition
        (i < N), what i starts from and what it grows by."""
        if loop.operation != "while":
            return Runs()
        if known := _TRIPS.search(loop.rest):
            return Runs(int(known[1]))
        names = dict(_CALLED.findall(loop.rest))
        condition = self._computations.get(names.get("condition", ""), {})
        for one in condition.values():
            if one.operation == "compare" and "direction=LT" in one.rest:
                counter, bound = (condition.get(name) for name in one.operands)
                end = _constant(bound)
                index = re.search(r"index=(\d+)", counter.rest if counter else "")
                if end is not None and index:
                    body = self._computations.get(names.get("body", ""), {})
                    start = _started(loop, int(index[1]), inside)
                    step = _grown(body, int(index[1]))
                    return Runs(max(0, -(-(end - start) // step)))
        return Runs(1, False)


def _instruction(root: str | None, name: str, text: str) -> Instruction | None:
    found = _OPERATION.search(text)
    if found is None:
        return None
    depth, end = 1, found.end()
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    inner = text[found.end() : end - 1]
    # what is constant has its value there
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or (inner,)
    shape, rest = text[: found.start()], text[end:]
    return Instruction(name, shape, found[1], operands, rest, root is not None)


def _called(one: Instruction) -> list[str]:
    if one.operation.endswith(("-update", "-done")):  # of what has begun before
        return []
    names = [name for _, name in _CALLED.findall(one.rest)]
    for several in _SEVERAL.findall(one.rest):
        names += re.findall(r"[\w.\-]+", several)
    return names


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.operation != "constant":
        return None
    value = one.operands[0]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _started(loop: Instruction, index: int, inside: dict) -> int:
    """The first value of a loop's counter; 0, where every loop of JAX starts, if that
    cannot be read."""
    start = _element(inside.get(loop.operands[0]), index, inside)
    return _constant(start) or 0


def _grown(body: dict, index: int) -> int:
    """By what a loop's counter grows; 1, as in every loop of JAX, if that cannot be
    read."""
    root = next((one for one in body.values() if one.root), None)
    grown = _element(root, index, body)
    if grown is not None and grown.operation == "add":
        steps = [_constant(body.get(name)) for name in grown.operands]
        return next((step for step in steps if step), 1)
    return 1


def _element(whole: Instruction | None, index: int, inside: dict) -> Instruction | None:
    """What a tuple has in a place, copies looked through."""
    if whole is None or whole.operation != "tuple":
        return None
    one = inside.get(whole.operands[index])
    while one is not None and one.operation in ("copy", "bitcast"):
        one = inside.get(one.operands[0])
    return one


def _exchanged(one: Instruction, kind: str, inside: dict) -> int:
    given = sum(nbytes(inside[x].shape) for x in one.operands if x in inside)
    got = nbytes(one.shape)
    if one.operation.endswith("-start") and kind != "all-reduce":
        # that of others has its operands too, and numbers that say how far it is
        got -= given + sum(4 for _ in re.findall(r"\b[us]32\[\]", one.shape))
    return max(given, got)


def _source(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.rest)
    return found[1] if found else ""


def nbytes(shape: str) -> int:
    """The bytes of a shape, or of all in a tuple of shapes, without padding."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        for size in filter(None, sizes.split(",")):
            bits *= int(size.removeprefix("<="))
        total += -(-bits // 8)
    return total
