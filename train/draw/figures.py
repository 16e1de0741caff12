"""The figures of a report, as panels of SVG to be set into an HTML page."""

import functools
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.draw.markup import Panel, image
from train.probe import Block

WIDTH = 9.6  # inches, of a page
# Of a panel, by how many stand beside one another in a page that is wide enough; on a
# phone each is as wide as the screen, about 3.6 inches.
PANEL = {1: 4.2, 2: 3.75, 3: 3.1, 4: 2.0}
THUMBS = 8  # pictures beside one another
BEFORE, AFTER, SOFT = "#dd8a2c", "#3f8fd2", "#8b9097"
COLOURS = (AFTER, BEFORE, "#3fa66b", "#c65d8c", "#8b7fd1", "#9a8a3c", "#4fb3bf", SOFT)
INK = "#010203"  # becomes the text colour of the page
BLOCKS = 6  # drawn of a deep stack
LINES = 6  # filters in one panel
POINTS = 2048  # eigenvalues in one panel
MARKED = 200  # validations of a curve that have a mark each, beside the line
VECTORS = 512  # longer lines are drawn as pixels
EDGE = 1e-6  # what a logarithmic axis shows of nothing

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # ids that do not change from run to run
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": SOFT,
    "grid.alpha": 0.2,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,  # and where it is "best" is said: unsaid, it warns if slow
    "lines.linewidth": 1.4,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 120,
}
SHARE = LinearSegmentedColormap.from_list("share", ["#3f8fd200", "#3f8fd2ff"])
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0, BEFORE), (0.5, "#dd8a2c00"), (0.5, "#3f8fd200"), (1, AFTER)]
)


def _as_panels(draw):
    """`draw`, which yields titles and `Figure`s, made to return `Panel`s of SVG."""

    @functools.wraps(draw)
    def drawn(*args) -> list[Panel]:
        with matplotlib.rc_context(STYLE):
            return [
                Panel(title, _svg(figure, number))
                for number, (title, figure) in enumerate(draw(*args))
            ]

    return drawn


def _svg(figure: Figure, number: int) -> str:
    out = io.StringIO()
    for axis in figure.axes:
        axis.minorticks_off()  # half of the drawing time of logarithmic axes
    figure.savefig(out, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    # Panels with parts in common must not share ids within a page.
    prefix = f"f{zlib.crc32(svg.encode()):08x}{number}"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    return svg.replace(INK, "currentColor")


def _panel(columns: int, height: float):
    """A figure with one axis, of a panel that is one of so many beside one another."""
    figure = Figure((PANEL[columns], height), layout="constrained")
    return figure, figure.subplots()


@_as_panels
def curves(
    runs: Mapping[str, Sequence[Mapping]],
    panels: Sequence[tuple],
    chance: Mapping[str, float],
) -> Iterator[tuple[str, Figure]]:
    """What runs measured, over their steps; the lines of several are in `key`.

    Args:
        runs: label -> lines of metrics.jsonl.
        panels: (title, name, splits); one that no run has is left out.
        chance: name -> what is reached without reading the inputs.
    """

    def points(rows, name, split):
        found = [
            (r["step"], r[name]) for r in rows if r["split"] == split and name in r
        ]
        return np.array(found, float).reshape(-1, 2).T

    several, most = len(runs) > 1, {"train": 1, "validation": MARKED}
    for title, name, splits in panels:
        if not any(points(r, name, s).size for r in runs.values() for s in splits):
            continue
        figure, axis = _panel(2, 2.3)
        for index, rows in enumerate(runs.values()):
            for place, split in enumerate(splits):
                steps, values = points(rows, name, split)
                axis.plot(
                    steps,
                    values,
                    color=COLOURS[(index if several else place) % len(COLOURS)],
                    linestyle=_style(index),
                    marker="." if len(steps) <= most[split] else "",
                    label=split,
                )
        if name in chance:
            axis.axhline(chance[name], color=SOFT, linestyle=":", label="chance")
        low, high = axis.dataLim.intervaly
        if low > 0 and high > 10 * low and name not in ("lr", "accuracy"):
            axis.set_yscale("log")
        axis.set(xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if not several and len(splits) > 1:
            axis.legend(loc="best")
        elif name in chance:
            axis.legend(handles=axis.lines[-1:], loc="best")
        yield title, figure


def key(labels: Sequence[str]) -> list[tuple[str, str, bool]]:
    """The lines of `curves` of several runs: label, colour, dashed."""
    return [
        (label, COLOURS[index % len(COLOURS)], _style(index) == "--")
        for index, label in enumerate(labels)
    ]


def _style(index: int) -> str:
    return "-" if index < len(COLOURS) else "--"


@_as_panels
def filters(blocks: Sequence[Block]) -> Iterator[tuple[str, Figure]]:
    """Of each block its filters at every stage, then how long it remembers."""
    for number, block in enumerate(spread(blocks, BLOCKS)):
        stages = list(block.responses)
        # A skip connection, all at lag 0, would flatten everything else.
        others = (block.lags != 0) | (len(block.lags) == 1)
        features = spread(np.arange(len(block.features)), LINES)
        highest = max(
            np.abs(r.filters[features][:, others]).max()
            for r in block.responses.values()
        )
        pixels = np.count_nonzero(others) > VECTORS
        marker = "." if np.count_nonzero(others) < 3 else ""
        for stage in stages:
            figure, axis = _panel(3, 1.9)
            lines = block.responses[stage].filters[features][:, others]
            for colour, line in zip(COLOURS, lines, strict=False):
                axis.plot(
                    block.lags[others],
                    line,
                    color=colour,
                    marker=marker,
                    rasterized=pixels,
                    linewidth=1.1,
                )
            if highest > 0:
                axis.set_ylim(-1.05 * highest, 1.05 * highest)
            axis.set_xlabel("tokens since the impulse")
            yield f"{block.title}: {stage}", figure
        figure, axis = _panel(3, 1.9)
        for stage, colour in zip(stages[::-1], (AFTER, BEFORE), strict=False):
            memory = np.maximum(block.responses[stage].memory, EDGE**2)
            look = dict(color=colour, rasterized=pixels, label=stage)
            axis.semilogy(block.lags, memory, **look)
        axis.set_xlabel("tokens since the impulse")
        if not number:
            axis.legend(loc="best")
        yield "size over all features", figure


@_as_panels
def matrices(by_title: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """Matrices [L, L] of signed numbers by their titles, on one scale of colours, which
    few of them exceed. The diagonal is left out: a skip connection would dwarf the
    rest."""
    off_diagonal = {
        title: M[~np.eye(len(M), dtype=bool)] for title, M in by_title.items()
    }
    sizes = [np.abs(M[M != 0]) for M in off_diagonal.values() if np.any(M)]
    highest = max((np.quantile(size, 0.99) for size in sizes), default=1.0)
    for title, M in by_title.items():
        figure, axis = _panel(2, 3.5)
        look = dict(cmap=SIGNED, vmin=-highest, vmax=highest, interpolation="none")
        pixels = axis.imshow(np.where(np.eye(len(M)), np.nan, M), **look)
        axis.grid(False)
        axis.spines[:].set_visible(True)
        axis.set(xlabel="token that is read", ylabel="token that reads")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(6, integer=True))
        figure.colorbar(pixels, ax=axis, shrink=0.8, aspect=30, pad=0.02)
        yield title, figure


@_as_panels
def spectra(blocks: Sequence[Block], length: int) -> Iterator[tuple[str, Figure]]:
    """Of each block the eigenvalues of a token's step, those of the continuous system
    in units of a token, and the timescales."""
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 200))
    for number, block in enumerate(spread(blocks, BLOCKS)):
        values = {s: r.log_a for s, r in block.responses.items() if r.log_a.size}
        colours = dict(zip(list(values)[::-1], (AFTER, BEFORE), strict=False))

        def scatter(axis, coordinates, values=values, colours=colours):
            for stage, log_a in values.items():
                sample = spread(log_a, POINTS)
                size = 5 if len(sample) > VECTORS else 12
                look = dict(color=colours[stage], s=size, linewidths=0, alpha=0.55)
                look |= dict(rasterized=len(sample) > VECTORS, label=stage)
                axis.scatter(*coordinates(sample), **look)

        figure, disc = _panel(3, 2.35)
        disc.plot(circle.real, circle.imag, color=SOFT, linewidth=0.8)
        scatter(disc, lambda log_a: (np.exp(log_a).real, np.exp(log_a).imag))
        disc.set(aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        disc.set(xlabel="Re a", ylabel="Im a")
        yield f"{block.title}: a", figure

        figure, plane = _panel(3, 2.35)
        scatter(plane, lambda x: (1 / timescales(x), np.abs(x.imag) / (2 * np.pi)))
        plane.set(xscale="log", xlabel="decay per token, -Re log a")
        plane.set_yscale("symlog", linthresh=1e-2, linscale=0.5)
        highest = np.abs(np.concatenate([*values.values()]).imag).max() / (2 * np.pi)
        plane.set(ylabel="cycles per token", ylim=(-1e-3, 1.4 * max(highest, 0.5)))
        plane.axhline(0.5, color=SOFT, linestyle=":", linewidth=1)
        yield f"{block.title}: log a", figure

        figure, times = _panel(3, 2.35)
        scales = {s: np.log10(timescales(log_a)) for s, log_a in values.items()}
        together = np.concatenate(list(scales.values()))
        bins = np.linspace(together.min() - 0.1, together.max() + 0.1, 33)
        for stage, scale in scales.items():
            counts, _ = np.histogram(scale, bins)
            share, colour = counts / counts.sum(), colours[stage]
            look = dict(color=colour, fill=True, alpha=0.3, label=stage)
            times.stairs(share, 10**bins, **look)
            times.stairs(share, 10**bins, color=colour)
        times.set(xscale="log", xlabel="timescale, tokens", ylabel="share of modes")
        times.axvline(length, color=SOFT, linestyle=":", linewidth=1)
        if not number:
            times.legend(loc="best")
        yield f"{block.title}: timescales", figure


@_as_panels
def confusion(counts: np.ndarray) -> Iterator[tuple[str, Figure]]:
    """counts [K, M] of more classes than a table shows: rows the true class, columns
    the answer."""
    figure, axis = _panel(1, 4.0)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap=SHARE, vmin=0, vmax=1, interpolation="none")
    axis.set(xlabel="answer", ylabel="class")
    axis.grid(False)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(10, integer=True))
    yield "", figure


def pictures(inputs: np.ndarray, labels: Sequence[str]) -> list[Panel]:
    """Images [n, h, w] (0 is white) or [n, h, w, 3], in [0, 1], under their labels."""
    bright = inputs if inputs.ndim == 4 else 1 - inputs
    pixels = np.rint(255 * bright).astype(np.uint8)
    return [
        Panel(label, image(png(x), label))
        for x, label in zip(pixels, labels, strict=True)
    ]


def png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w], [h, w, 1] or [h, w, 3] as a PNG."""
    from PIL import Image  # only needed here

    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="png")
    return out.getvalue()


@_as_panels
def lines(
    inputs: np.ndarray, mask: np.ndarray, labels: Sequence[str]
) -> Iterator[tuple[str, Figure]]:
    """Sequences [n, L] or [n, L, C] of numbers, their real tokens only."""
    for x, real, label in zip(inputs, mask, labels, strict=True):
        figure, axis = _panel(4, 1.4)
        for colour, channel in zip(COLOURS, np.atleast_2d(x[real].T), strict=False):
            few = len(channel) < 3
            look = dict(marker="." if few else "", rasterized=len(channel) > VECTORS)
            axis.plot(channel, color=colour, linewidth=1, **look)
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        yield label, figure


@_as_panels
def positions(
    correct: np.ndarray, counted: np.ndarray, chance: float | None
) -> Iterator[tuple[str, Figure]]:
    """Share of right answers by position; correct, counted [n, L] bool."""
    L = counted.shape[1]
    edges = np.unique(np.linspace(0, L, min(L, 128) + 1).astype(int))
    sums = [np.add.reduceat(x.sum(axis=0), edges[:-1]) for x in (correct, counted)]
    answered = sums[1] > 0
    figure, axis = _panel(1, 2.4)
    centres = (edges[:-1] + edges[1:] - 1) / 2
    shares = sums[0][answered] / sums[1][answered]
    axis.plot(centres[answered], shares, color=AFTER, marker=".")
    if chance is not None:
        axis.axhline(chance, color=SOFT, linestyle=":", label="chance")
        axis.legend(loc="best")
    axis.set(xlabel="position", ylabel="accuracy", ylim=(-0.03, 1.03))
    yield "", figure


@_as_panels
def truth(predicted: np.ndarray, targets: np.ndarray) -> Iterator[tuple[str, Figure]]:
    """Predictions beside targets, both [m, K]: a colour per output."""
    figure, axis = _panel(1, 3.9)
    for index, colour in zip(range(targets.shape[1]), COLOURS, strict=False):
        x, y = (spread(v[:, index], POINTS) for v in (targets, predicted))
        look = dict(color=colour, s=8, linewidths=0, alpha=0.6)
        axis.scatter(x, y, rasterized=len(x) > VECTORS, **look)
    axis.axline((0.0, 0.0), slope=1, color=SOFT, linewidth=1)
    axis.set(xlabel="target", ylabel="prediction")
    low, high = targets.min(), targets.max()
    room = 0.05 * (high - low) or 1.0
    axis.set(xlim=(low - room, high + room))
    yield "", figure


@_as_panels
def followed(
    outputs: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray,
    labels: Sequence[str],
) -> Iterator[tuple[str, Figure]]:
    """The first output and its target over the real tokens of sequences [n, L, K]."""
    for number, (y, target, real, label) in enumerate(
        zip(outputs, targets, mask, labels, strict=True)
    ):
        figure, axis = _panel(2, 1.7)
        for line, colour, name in ((target, SOFT, "target"), (y, AFTER, "prediction")):
            look = dict(rasterized=len(line) > VECTORS, label=name)
            axis.plot(line[real, 0], color=colour, **look)
        axis.set_xlabel("token")
        if not number:
            axis.legend(loc="best")
        yield label, figure


def timescales(log_a: np.ndarray) -> np.ndarray:
    """1 / -Re log a, the tokens after which a mode has decayed by e; at most 1 / EDGE
    where it does not decay."""
    return 1.0 / np.maximum(-log_a.real, EDGE)


def spread(items: Sequence, most: int) -> Sequence:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    chosen = np.linspace(0, len(items) - 1, most).astype(int)
    return (
        items[chosen] if isinstance(items, np.ndarray) else [items[i] for i in chosen]
    )
