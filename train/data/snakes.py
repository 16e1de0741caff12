"""Pictures of the Pathfinder task: are the two marked tips those of one curve?

A curve, a snake, is a row of dashes, paddles. Two long snakes of equal length, whose
tips two disks mark, lie among short ones. The definition is that of Linsley et al.,
https://arxiv.org/abs/1805.08315, its parameters those of the Long Range Arena,
https://arxiv.org/abs/2011.04006. Where that draws from a continuum a grid is left here:
a paddle starts from a pixel, its pivot, so that all that a picture can hold stands in a
table, and thousands of snakes grow at once, each step a few array operations.

A picture is a function of its rules and its key and of nothing else: not of those that
are drawn with it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEGREES = 360
RETRIES = 2  # of a paddle, and of the second snake's seed, before a snake has failed
DISTRACTOR_RETRIES = 4  # of a short snake, before the picture does without
TAILS = 32  # places that are looked at for a short snake at a time
# Attempts at the two long snakes of a picture that are made side by side: twice as many
# each time, as most fail, up to the most.
SIDE_BY_SIDE, MOST_SIDE_BY_SIDE = 16, 256
ATTEMPTS = 50_000  # until there seems to be no room for two long snakes
CELLS = 2**25  # pixels that are held at once: bounds the memory of these attempts

# In proportion to 1 straight on, the probability of a turn whose cosine would be 0: a
# snake that can go nowhere else, such as at the border, turns back. The published
# definition has it from rounding, and hardly a long snake would be possible without.
SHARP = 1e-30

LANCZOS = 3  # lobes of the filter that makes pixels of finer ones

# What holds a pixel: a finished paddle or the border, the last paddle of the snake that
# grows, that of the other, the earlier ones of a short snake that may be taken back.
TAKEN, OWN, OTHER, UNSURE = (np.uint8(2**i) for i in range(4))
NOTHING = np.uint8(0)


class Rules(NamedTuple):
    """What a picture is made by; lengths are in pixels.

    Attributes:
        side: of the picture.
        padding: the border that no paddle touches.
        margins: half the gap between two paddles of a snake, and the least between
            snakes: a picture has one of these.
        length, thickness: of a paddle.
        radius: of the disk that marks a tip.
        contour: paddles of each long snake.
        distance: between the tails of the two long snakes.
        continuity: how straight snakes are: a turn by t has a probability in proportion
            to cos^2(min(continuity |t|, pi / 2)).
        distractor: paddles of a short snake.
        distractors: short snakes, as far as there is room.
        contrast: brightness of a paddle and of a disk, cut at 1, which is white.
        scale: finer pixels along the side of one, that paddles are drawn in.
    """

    side: int
    padding: int
    margins: tuple[int, ...]
    length: int
    thickness: float
    radius: float
    contour: int
    distance: int
    continuity: float
    distractor: int
    distractors: int
    contrast: float
    scale: int = 2


class Pictures(NamedTuple):
    """n of them, in the order of their numbers.

    Attributes:
        pixels: uint8 [n, side, side].
        labels: uint8 [n], 1 where the disks mark the two tips of one snake.
        margins: int [n], those of the rules that were drawn.
        heads: int [n, 2 contour + distractors distractor, 2], (y, x) of the end of each
            paddle, snake by snake, the long ones first; -1 where there was no room.
        disks: int [n, 2, 2], (y, x) of the centres.
    """

    pixels: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    heads: np.ndarray
    disks: np.ndarray


def draw(rules: Rules, numbers: Sequence[int], *key: int) -> Pictures:
    """The pictures `numbers` of all those that `rules` and `key` make.

    Raises:
        ValueError: pictures in which there is no room for two long snakes.
    """
    table, keys = _table(rules), [(*key, int(number)) for number in numbers]
    first = _uniform(keys, "picture", 3)
    margin = (first[:, 0] * len(rules.margins)).astype(int)
    same, marked = first[:, 1] < 0.5, (first[:, 2] < 0.5).astype(int)
    canvas = _Canvas(rules, table, margin)
    paddles = [*_long_snakes(rules, table, margin, keys)]
    for paddle in paddles:
        canvas.hold(canvas.all, paddle, TAKEN)
    paddles += _short_snakes(rules, canvas, keys)
    row, place = (np.stack(field, axis=1) for field in zip(*paddles, strict=True))
    pictures = np.arange(len(keys))
    heads = place + table.head[margin[:, None], row]
    other = np.where(same, marked, 1 - marked)
    tail = place[pictures, marked * rules.contour]
    head = heads[pictures, (other + 1) * rules.contour - 1]
    disks = np.stack([tail, head], axis=1)
    heads = np.where((row == table.none)[..., None], -1, table.position(heads))
    return Pictures(
        canvas.drawn(_Paddles(row, place), disks),
        same.astype(np.uint8),
        np.array(rules.margins)[margin],
        heads,
        table.position(disks),
    )


def _uniform(keys, stage: str, *shape: int) -> np.ndarray:
    """Numbers of [0, 1) [n, *shape], of each key its own, and of each stage others."""
    code = int.from_bytes(stage.encode())
    return np.stack([np.random.default_rng((*k, code)).random(shape) for k in keys])


class _Paddles(NamedTuple):
    """One of each of n canvases: the table's rows, and the places of their pivots."""

    row: np.ndarray
    place: np.ndarray

    def __getitem__(self, index) -> "_Paddles":
        return _Paddles(self.row[index], self.place[index])


class _Table(NamedTuple):
    """Every paddle that there can be, [M, K]: M margins; K paddles, of which the first
    `turns` follow another, the next 360 begin a snake, at the angle of their number,
    and the last is none. Places are flat, on a canvas that is wider than the picture by
    `reach` on each side; offsets are from a paddle's pivot, or from the tail of a snake
    that it begins.

    Attributes:
        angle: [M, K] radians, from its tail to its head.
        head: [M, K] its end.
        next: [M, K] the pivot of the paddle that follows, a margin beyond the head.
        body: [M, K, P] its pixels; the first again where it has fewer.
        covered: [M, K, Q] those within a margin of it too.
        lit: [M, K, R] pixels that are not black; `value` how bright.
        disk: [1, D] the same of a disk about its centre; `disk_value` [1, D].
        possible: bool [M, turns], False where a margin has fewer.
        width: of the canvas.
    """

    angle: np.ndarray
    head: np.ndarray
    next: np.ndarray
    body: np.ndarray
    covered: np.ndarray
    lit: np.ndarray
    value: np.ndarray
    disk: np.ndarray
    disk_value: np.ndarray
    possible: np.ndarray
    width: int
    reach: int

    @property
    def turns(self) -> int:
        return self.possible.shape[1]

    @property
    def none(self) -> int:
        return self.angle.shape[1] - 1

    def begun(self, number: np.ndarray) -> np.ndarray:
        """The rows of paddles that begin a snake, from numbers of [0, 1)."""
        return self.turns + (number * DEGREES).astype(int)

    def place(self, position: np.ndarray) -> np.ndarray:
        """Of (y, x) on the picture [..., 2]."""
        y, x = np.moveaxis(position, -1, 0) + self.reach
        return y * self.width + x

    def position(self, place: np.ndarray) -> np.ndarray:
        """(y, x) on the picture [..., 2] of a place."""
        return np.stack(np.divmod(place, self.width), axis=-1) - self.reach


class _Canvas:
    """What holds the pixels of n pictures while snakes grow on them. Methods are told
    `at` [m], which of the pictures they are about; `all` is all of them."""

    def __init__(self, rules: Rules, table: _Table, margin: np.ndarray):
        n, width = len(margin), table.width
        empty = np.full((width, width), TAKEN)
        inside = slice(table.reach + rules.padding, -table.reach - rules.padding)
        empty[inside, inside] = NOTHING
        self.all, self.table, self._margin = np.arange(n), table, margin
        self._continuity, self._held = rules.continuity, np.tile(empty.ravel(), n)
        self._origin = self.all * width**2

    def hold(self, at, paddles: _Paddles, by, no_more_by=NOTHING) -> None:
        """The paddles' pixels are held by something, and no more by something else."""
        body = self.table.body[self._margin[at], paddles.row]
        places = (self._origin[at] + paddles.place)[:, None] + body
        self._held[places] = (self._held.take(places) & ~no_more_by) | by

    def fits(self, at, paddles: _Paddles, over=NOTHING) -> np.ndarray:
        """Whether nothing is within a margin of the paddles [m, ...], but for what is
        held by `over`; bool [m, ...]."""
        margin, origin = self._margin[at], self._origin[at]
        more = paddles.row.ndim - 1
        margin, origin = (x.reshape(*x.shape, *[1] * more) for x in (margin, origin))
        covered = self.table.covered[margin, paddles.row]
        places = (origin + paddles.place)[..., None] + covered
        return ~(self._held.take(places) & ~over).any(axis=-1)

    def follow(self, at, last: _Paddles, number: np.ndarray, over) -> _Paddles:
        """The paddles after `last`, none where none fits; number [m, t]: of [0, 1), one
        for each of the t times that a paddle is drawn."""
        table, margin = self.table, self._margin[at]
        pivot = last.place + table.next[margin, last.row]
        ahead = slice(table.turns)
        heads = (self._origin[at] + pivot)[:, None] + table.head[margin, ahead]
        free = (self._held.take(heads) & ~over) == 0
        turn = table.angle[margin, ahead] - table.angle[margin, last.row][:, None]
        turn = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        turn = np.minimum(self._continuity * turn, np.pi / 2)
        weight = np.maximum(np.cos(turn) ** 2, SHARP) * (free & table.possible[margin])
        reached = np.cumsum(weight, axis=1)
        rows = np.full(len(at), table.none)
        left = np.flatnonzero(reached[:, -1])
        for column in number.T:
            wanted = column[left] * reached[left, -1]
            row = (reached[left] <= wanted[:, None]).sum(axis=1)
            row = np.minimum(row, table.turns - 1)  # a number that was rounded to 1
            fits = self.fits(at[left], _Paddles(row, pivot[left]), over)
            rows[left[fits]] = row[fits]
            left = left[~fits]
            if not len(left):
                break
        return _Paddles(rows, pivot)

    def drawn(self, paddles: _Paddles, disks: np.ndarray) -> np.ndarray:
        """The pixels, uint8 [n, side, side], of paddles [n, k] and disks about the
        places [n, 2]."""
        table = self.table
        pixels = np.zeros(len(self._held), np.uint8)
        for row, place in zip(*(field.T for field in paddles), strict=True):
            where = table.lit[self._margin, row], table.value[self._margin, row]
            self._brighten(pixels, place, *where)
        for place in disks.T:
            self._brighten(pixels, place, table.disk, table.disk_value)
        inside = slice(table.reach, -table.reach)
        pixels = pixels.reshape(len(self.all), table.width, table.width)
        return np.ascontiguousarray(pixels[:, inside, inside])

    def _brighten(self, pixels, place, lit, value) -> None:
        places = (self._origin + place)[:, None] + lit
        pixels[places] = np.maximum(pixels.take(places), value)


def _long_snakes(rules: Rules, table: _Table, margin, keys) -> list[_Paddles]:
    """The paddles of the two long snakes of every picture, one after another: those of
    the first attempt in which both come to their full length."""
    slots = 2 * rules.contour
    row, place = (np.zeros((len(keys), slots), int) for _ in range(2))
    left, done, size = np.arange(len(keys)), 0, SIDE_BY_SIDE
    while len(left):
        if done > ATTEMPTS:
            raise ValueError(
                f"two snakes of {rules.contour} paddles do not fit into a picture of "
                f"{rules.side} pixels, in {done} attempts: it must have fewer"
            )
        fit = np.zeros(len(left), bool)
        at_once = max(CELLS // (size * table.width**2), 1)
        for start in range(0, len(left), at_once):
            some = left[start : start + at_once]
            numbers = _uniform(
                [keys[i] for i in some], f"{done}", size, _pair_numbers(rules)
            )
            canvas = _Canvas(rules, table, np.repeat(margin[some], size))
            paddles, fine = _pair(rules, canvas, np.concatenate(numbers))
            fine = fine.reshape(len(some), size)
            fits, first = fine.any(axis=1), np.argmax(fine, axis=1)
            found = (np.arange(len(some)) * size + first)[fits]
            for slot, paddle in enumerate(paddles):
                row[some[fits], slot], place[some[fits], slot] = paddle[found]
            fit[start : start + at_once] = fits
        left = left[~fit]
        done, size = done + size, min(2 * size, MOST_SIDE_BY_SIDE)
    return [_Paddles(row[:, slot], place[:, slot]) for slot in range(slots)]


def _pair_numbers(rules: Rules) -> int:
    tries = RETRIES + 1
    return 3 + 2 * tries + 2 * (rules.contour - 1) * tries


def _pair(rules: Rules, canvas: _Canvas, numbers: np.ndarray):
    """The paddles of an attempt at two long snakes in each picture, and where both came
    to their full length."""
    table, at, tries = canvas.table, canvas.all, RETRIES + 1
    paddles = [
        _Paddles(np.full(len(at), table.none), np.zeros(len(at), int))
        for _ in range(2 * rules.contour)
    ]
    first, numbers = np.split(numbers, [3], axis=1)
    seeds, numbers = np.split(numbers, [2 * tries], axis=1)
    numbers = numbers.reshape(len(at), rules.contour - 1, 2, tries)
    # Far from the edges, so that there is room for the other on every side.
    band = 2 * rules.distance
    tail = band + (first[:, 1:] * (rules.side - 2 * band)).astype(int)
    last = [_Paddles(table.begun(first[:, 0]), table.place(tail))]
    canvas.hold(at, last[0], OWN)
    second = paddles[rules.contour]
    for direction, angle in np.moveaxis(seeds.reshape(len(at), tries, 2), 0, 2):
        turn = 2 * np.pi * direction
        step = rules.distance * np.stack([np.sin(turn), np.cos(turn)], axis=1)
        other = tail + np.round(step).astype(int)
        inside = ((other >= 0) & (other < rules.side)).all(axis=1)
        place = table.place(np.clip(other, 0, rules.side - 1))
        seed = _Paddles(table.begun(angle), place)
        fits = inside & (second.row == table.none) & canvas.fits(at, seed)
        second.row[fits], second.place[fits] = seed[fits]
    last.append(second)
    at = np.flatnonzero(second.row != table.none)
    last = [snake[at] for snake in last]
    canvas.hold(at, last[1], OTHER)
    paddles[0].row[at], paddles[0].place[at] = last[0]
    for step in range(rules.contour - 1):
        for which, own in enumerate((OWN, OTHER)):
            new = canvas.follow(at, last[which], numbers[at, step, which], over=own)
            went = new.row != table.none
            at, new, last = at[went], new[went], [snake[went] for snake in last]
            # Held for its own snake too from the paddle after the next on.
            canvas.hold(at, last[which], TAKEN, no_more_by=own)
            canvas.hold(at, new, own)
            kept = paddles[which * rules.contour + step + 1]
            kept.row[at], kept.place[at] = last[which] = new
    fine = np.zeros(len(canvas.all), bool)
    fine[at] = True
    return paddles, fine


def _short_snakes(rules: Rules, canvas: _Canvas, keys) -> list[_Paddles]:
    """The paddles of the short snakes of every picture, one after another."""
    tries = DISTRACTOR_RETRIES + 1
    each = 1 + 2 * TAILS + (rules.distractor - 1) * (RETRIES + 1)
    shape = rules.distractors, tries, each
    numbers = _uniform(keys, "distractors", *shape)
    paddles = []
    for snake in range(rules.distractors):
        own = [
            _Paddles(np.full(len(keys), canvas.table.none), np.zeros(len(keys), int))
            for _ in range(rules.distractor)
        ]
        left = canvas.all
        for number in range(tries):
            if len(left):
                grew = _short(rules, canvas, left, numbers[left, snake, number], own)
                left = left[~grew]
        paddles += own
    return paddles


def _short(rules: Rules, canvas: _Canvas, at, numbers, paddles) -> np.ndarray:
    """Adds one short snake to each picture; where it does not come to its full length,
    as the bool [m] says that is returned, nothing is left of it."""
    table = canvas.table
    angle, tails, numbers = np.split(numbers, [1, 1 + 2 * TAILS], axis=1)
    numbers = numbers.reshape(len(at), rules.distractor - 1, RETRIES + 1)
    tails = table.place((tails * rules.side).astype(int).reshape(len(at), TAILS, 2))
    seeds = _Paddles(np.repeat(table.begun(angle), TAILS, axis=1), tails)
    fits = canvas.fits(at, seeds)
    seeds = seeds[np.arange(len(at)), np.argmax(fits, axis=1)]
    alive = np.flatnonzero(fits.any(axis=1))
    last = seeds[alive]
    canvas.hold(at[alive], last, OWN)
    paddles[0].row[at[alive]], paddles[0].place[at[alive]] = last
    for step, kept in enumerate(paddles[1:]):
        new = canvas.follow(at[alive], last, numbers[alive, step], over=OWN)
        went = new.row != table.none
        lost = at[alive[~went]]
        for earlier in paddles[: step + 1]:
            canvas.hold(lost, earlier[lost], NOTHING, no_more_by=OWN | UNSURE)
            earlier.row[lost] = table.none
        alive, new, last = alive[went], new[went], last[went]
        canvas.hold(at[alive], last, UNSURE, no_more_by=OWN)
        canvas.hold(at[alive], new, OWN)
        kept.row[at[alive]], kept.place[at[alive]] = last = new
    for kept in paddles:
        canvas.hold(at[alive], kept[at[alive]], TAKEN, no_more_by=OWN | UNSURE)
    grew = np.zeros(len(at), bool)
    grew[alive] = True
    return grew


@functools.cache
def _table(rules: Rules) -> _Table:
    """Of the paddles of one set of rules."""
    widest, thick = max(rules.margins), int(np.ceil(rules.thickness / 2))
    reach = rules.length + 2 * widest + thick + max(widest, LANCZOS)
    reach = max(reach, int(np.ceil(rules.radius)) + LANCZOS)
    grid = _Grid(rules, reach)
    angles = 2 * np.pi * np.arange(DEGREES) / DEGREES
    begun = rules.length * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    ahead = [_circle(rules.length + margin) for margin in rules.margins]
    turns = max(map(len, ahead))
    none = _Row(0.0, 0, 0, *(np.zeros(1, int) for _ in range(4)))
    rows = []
    for margin, heads in zip(rules.margins, ahead, strict=True):
        rows += [grid.row(margin, head) for head in heads]
        rows += [none] * (turns - len(heads))
        rows += [grid.row(margin, head) for head in begun]
        rows.append(none)
    fields = [_even(field) for field in zip(*rows, strict=True)]
    shape = len(rules.margins), turns + DEGREES + 1
    disk, value = grid.lit(np.hypot(*grid.fine) <= rules.radius)
    return _Table(
        *(field.reshape(*shape, *field.shape[1:]) for field in fields),
        disk=disk[None],
        disk_value=value[None],
        possible=np.array([np.arange(turns) < len(heads) for heads in ahead]),
        width=grid.width,
        reach=reach,
    )


class _Row(NamedTuple):
    """One paddle of a `_Table`; the same fields."""

    angle: float
    head: int
    next: int
    body: np.ndarray
    covered: np.ndarray
    lit: np.ndarray
    value: np.ndarray


def _even(values: Sequence) -> np.ndarray:
    """The values as one array, each made as long as the longest by its first item."""
    if np.ndim(values[0]) == 0:
        return np.array(values)
    most = max(map(len, values))
    return np.array(
        [np.pad(v, (0, most - len(v)), constant_values=v[0]) for v in values]
    )


def _circle(radius: int) -> np.ndarray:
    """Pixels (y, x) [k, 2] whose distance from the one in the middle is `radius`."""
    y, x = np.mgrid[-radius - 1 : radius + 2, -radius - 1 : radius + 2]
    on = np.abs(np.hypot(y, x) - radius) <= 0.5
    return np.stack([y[on], x[on]], axis=1)


class _Grid:
    """The pixels about a pivot, (y, x) [2, 2 reach + 1, 2 reach + 1], finer ones, and
    what a form in these makes of them."""

    def __init__(self, rules: Rules, reach: int):
        self._rules, self._reach = rules, reach
        self.width = rules.side + 2 * reach
        pixels = np.arange(-reach, reach + 1)
        fine = (np.arange(len(pixels) * rules.scale) + 0.5) / rules.scale - 0.5 - reach
        self._pixels = np.array(np.meshgrid(pixels, pixels, indexing="ij"))
        self.fine = np.array(np.meshgrid(fine, fine, indexing="ij"))
        apart = pixels[:, None] - fine
        weight = np.sinc(apart) * np.sinc(apart / LANCZOS) * (np.abs(apart) < LANCZOS)
        self._weight = weight / weight.sum(axis=1, keepdims=True)

    def row(self, margin: int, head: np.ndarray) -> _Row:
        """The paddle that ends at `head` (y, x), a pixel or between some."""
        rules, along = self._rules, head / np.hypot(*head)
        tail = head - rules.length * along
        apart = _distance(self._pixels, tail, head)
        body, covered = (
            self._offset(np.argwhere(apart <= within) - self._reach)
            for within in (max(rules.thickness, 1) / 2, rules.thickness / 2 + margin)
        )
        lit, value = self.lit(_distance(self.fine, tail, head) <= rules.thickness / 2)
        following = np.round(head + margin * along).astype(int)
        end = np.round(head).astype(int)
        return _Row(
            angle=float(np.arctan2(*along)),
            head=int(self._offset(end)),
            next=int(self._offset(following)),
            body=body,
            covered=covered,
            lit=lit,
            value=value,
        )

    def lit(self, form: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and brightness of the pixels that are not black; form: bool, of finer
        ones."""
        value = np.clip(self._weight @ form @ self._weight.T, 0, 1)
        value = np.round(255 * np.minimum(value * self._rules.contrast, 1))
        lit = np.argwhere(value)
        return self._offset(lit - self._reach), value[tuple(lit.T)].astype(np.uint8)

    def _offset(self, position: np.ndarray) -> np.ndarray:
        return position[..., 0] * self.width + position[..., 1]


def _distance(points: np.ndarray, tail, head) -> np.ndarray:
    """From points (y, x) [2, ...] to the line between two others."""
    from_tail = points - tail[:, None, None]
    line = head - tail
    share = np.clip(np.tensordot(line, from_tail, 1) / (line @ line), 0, 1)
    return np.hypot(*(from_tail - share * line[:, None, None]))
