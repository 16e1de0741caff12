"""The figures of a report, as SVG text to be set into an HTML page."""

import functools
import io
import re
import zlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.probe import Block

WIDTH = 9.6  # inches
BEFORE, AFTER, SOFT = "#dd8a2c", "#3f8fd2", "#8b9097"
COLOURS = (AFTER, BEFORE, "#3fa66b", "#c65d8c", "#8b7fd1", "#9a8a3c", "#4fb3bf", SOFT)
INK = "#010203"  # becomes the text colour of the page
BLOCKS = 6  # drawn of a deep stack
LINES = 6  # filters in one panel
POINTS = 2048  # eigenvalues in one panel
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
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 120,
}
SHARE = LinearSegmentedColormap.from_list("share", ["#3f8fd200", "#3f8fd2ff"])


def _as_svg(draw):
    """`draw`, which returns a `Figure`, made to return its SVG element."""

    @functools.wraps(draw)
    def drawn(*args):
        out = io.StringIO()
        with matplotlib.rc_context(STYLE):
            figure = draw(*args)
            for axis in figure.axes:
                axis.minorticks_off()  # half of the drawing time of logarithmic axes
            figure.savefig(out, format="svg", transparent=True)
        svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
        # Figures with parts in common must not share ids within a page.
        own = f"f{zlib.crc32(svg.encode()):08x}"
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", svg)
        return svg.replace(INK, "currentColor")

    return drawn


def _panels(rows: int, columns: int, height: float, **options):
    """A figure and its axes [rows, columns]; `height` is that of a row, in inches."""
    figure = Figure((WIDTH, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@_as_svg
def curves(runs: Mapping[str, Sequence[Mapping]], panels: Sequence[tuple]) -> Figure:
    """What runs measured, over their steps.

    Args:
        runs: label -> lines of metrics.jsonl.
        panels: (title, name, splits); one that no run has is left out.
    """

    def points(rows, name, split):
        found = [
            (r["step"], r[name]) for r in rows if r["split"] == split and name in r
        ]
        return np.array(found, float).reshape(-1, 2).T

    def measured(name, splits):
        return any(points(r, name, s).size for r in runs.values() for s in splits)

    panels = [panel for panel in panels if measured(*panel[1:])]
    figure, axes = _panels(-(-len(panels) // 2), 2, 2.4)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, name, splits) in zip(axes.flat, panels, strict=False):
        for index, (label, rows) in enumerate(runs.items()):
            for place, split in enumerate(splits):
                steps, values = points(rows, name, split)
                several = len(runs) > 1
                axis.plot(
                    steps,
                    values,
                    color=COLOURS[(index if several else place) % len(COLOURS)],
                    linestyle="-" if index < len(COLOURS) else "--",
                    marker="." if split == "validation" or len(steps) < 2 else "",
                    label=label if several else split,
                )
        low, high = axis.dataLim.intervaly
        if low > 0 and high > 10 * low and name not in ("lr", "accuracy"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(runs) == 1 and len(splits) > 1:
            axis.legend()
    if len(runs) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@_as_svg
def filters(blocks: Sequence[Block]) -> Figure:
    """A row per block: its filters at every stage, then how long it remembers."""
    blocks = spread(blocks, BLOCKS)
    stages = list(blocks[0].responses)
    figure, axes = _panels(len(blocks), len(stages) + 1, 1.9)
    for row, block in zip(axes, blocks, strict=True):
        # A skip connection, all at lag 0, would flatten everything else.
        seen = (block.lags != 0) | (len(block.lags) == 1)
        drawn = spread(np.arange(len(block.features)), LINES)
        highest = max(
            np.abs(r.filters[drawn][:, seen]).max() for r in block.responses.values()
        )
        pixels = np.count_nonzero(seen) > VECTORS
        marker = "." if np.count_nonzero(seen) < 3 else ""
        for axis, stage in zip(row, stages, strict=False):
            lines = block.responses[stage].filters[drawn][:, seen]
            for colour, line in zip(COLOURS, lines, strict=False):
                axis.plot(
                    block.lags[seen],
                    line,
                    color=colour,
                    marker=marker,
                    rasterized=pixels,
                    linewidth=1.1,
                )
            axis.set(title=f"{block.title}: {stage}")
            if highest > 0:
                axis.set_ylim(-1.05 * highest, 1.05 * highest)
        for stage, colour in zip(stages[::-1], (AFTER, BEFORE), strict=False):
            memory = np.maximum(block.responses[stage].memory, EDGE**2)
            look = dict(color=colour, rasterized=pixels, label=stage)
            row[-1].semilogy(block.lags, memory, **look)
        row[-1].set(title="size over all features")
    axes[0, -1].legend()
    for axis in axes[-1]:
        axis.set_xlabel("tokens since the impulse")
    return figure


@_as_svg
def spectra(blocks: Sequence[Block], length: int) -> Figure:
    """A row per block: eigenvalues of a token's step, those of the continuous system in
    units of a token, and the timescales."""
    blocks = spread(blocks, BLOCKS)
    figure, axes = _panels(len(blocks), 3, 2.35)
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 200))
    for row, block in zip(axes, blocks, strict=True):
        disc, plane, times = row
        disc.plot(circle.real, circle.imag, color=SOFT, linewidth=0.8)
        values = {s: r.log_a for s, r in block.responses.items() if r.log_a.size}
        colours = dict(zip(list(values)[::-1], (AFTER, BEFORE), strict=False))
        scales = {s: np.log10(timescales(log_a)) for s, log_a in values.items()}
        together = np.concatenate(list(scales.values()))
        bins = np.linspace(together.min() - 0.1, together.max() + 0.1, 33)
        for stage, log_a in values.items():
            some = spread(log_a, POINTS)
            size = 5 if len(some) > VECTORS else 12
            look = dict(color=colours[stage], s=size, linewidths=0, alpha=0.55)
            look |= dict(rasterized=len(some) > VECTORS, label=stage)
            a = np.exp(some)
            disc.scatter(a.real, a.imag, **look)
            cycles = np.abs(some.imag) / (2 * np.pi)
            plane.scatter(1 / timescales(some), cycles, **look)
            counts, _ = np.histogram(scales[stage], bins)
            share = counts / counts.sum()
            times.stairs(
                share, 10**bins, color=colours[stage], fill=True, alpha=0.3, label=stage
            )
            times.stairs(share, 10**bins, color=colours[stage])
        disc.set(title=block.title, aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        disc.set(xlabel="Re a", ylabel="Im a")
        plane.set(xscale="log", xlabel="decay per token, -Re log a", title="log a")
        plane.set_yscale("symlog", linthresh=1e-2, linscale=0.5)
        highest = np.abs(np.concatenate([*values.values()]).imag).max() / (2 * np.pi)
        plane.set(ylabel="cycles per token", ylim=(-1e-3, 1.4 * max(highest, 0.5)))
        plane.axhline(0.5, color=SOFT, linestyle=":", linewidth=1)
        times.set(xscale="log", xlabel="timescale, tokens", title="timescales")
        times.set(ylabel="share of modes")
        times.axvline(length, color=SOFT, linestyle=":", linewidth=1)
    axes[0, -1].legend()
    return figure


@_as_svg
def confusion(counts: np.ndarray, names: Sequence[str] = ()) -> Figure:
    """counts [K, M]: rows the true class, columns the answer; names of the classes."""
    K = max(counts.shape)
    side = float(np.clip(0.42 * K + 1.0, 3.2, 7.0))
    figure = Figure((side, side), layout="constrained")
    axis = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap=SHARE, vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="answer", ylabel="class")
    axis.grid(False)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(min(K, 20), integer=True))
    if names and K <= 20:
        shown = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
        plain = dict(parse_math=False)  # a name may have dollars
        axis.set_yticks(range(len(counts)), shown[: len(counts)], **plain)
        columns = [*shown, *map(str, range(len(shown), counts.shape[1]))]
        slanted = dict(rotation=45, ha="right", **plain)
        axis.set_xticks(range(counts.shape[1]), columns, **slanted)
    if K <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[i, j] > 0.5 else INK
                look = dict(ha="center", va="center", fontsize=8)
                axis.text(j, i, f"{count:.0f}", color=colour, **look)
    return figure


@_as_svg
def pictures(inputs: np.ndarray, labels: Sequence[str]) -> Figure:
    """Square images [n, s, s] or [n, s, s, 3] with what is written above each."""
    columns = 8
    rows = -(-len(inputs) // columns)
    figure, axes = _panels(rows, columns, 1.45)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label in zip(axes.flat, inputs, labels, strict=False):
        axis.imshow(image, cmap="gray_r", interpolation="nearest")
        axis.set_title(label, fontsize=8, parse_math=False)
    return figure


@_as_svg
def lines(inputs: np.ndarray, mask: np.ndarray, labels: Sequence[str]) -> Figure:
    """Sequences [n, L] or [n, L, C] of numbers, their real tokens only."""
    columns = 4
    figure, axes = _panels(-(-len(inputs) // columns), columns, 1.5)
    for axis in axes.flat[len(inputs) :]:
        axis.remove()
    for axis, x, real, label in zip(axes.flat, inputs, mask, labels, strict=False):
        for colour, channel in zip(COLOURS, np.atleast_2d(x[real].T), strict=False):
            few = len(channel) < 3
            look = dict(marker="." if few else "", rasterized=len(channel) > VECTORS)
            axis.plot(channel, color=colour, linewidth=1, **look)
        axis.set_title(label, fontsize=8, parse_math=False)
        axis.tick_params(labelsize=7)
    return figure


@_as_svg
def positions(correct: np.ndarray, counted: np.ndarray) -> Figure:
    """Share of right answers by position; correct, counted [n, L] bool."""
    L = counted.shape[1]
    edges = np.unique(np.linspace(0, L, min(L, 128) + 1).astype(int))
    sums = [np.add.reduceat(x.sum(axis=0), edges[:-1]) for x in (correct, counted)]
    here = sums[1] > 0
    figure = Figure((WIDTH, 2.6), layout="constrained")
    axis = figure.subplots()
    centres = (edges[:-1] + edges[1:] - 1) / 2
    axis.plot(centres[here], (sums[0][here] / sums[1][here]), color=AFTER, marker=".")
    axis.set(xlabel="position", ylabel="accuracy", ylim=(-0.03, 1.03))
    return figure


@_as_svg
def truth(predicted: np.ndarray, targets: np.ndarray) -> Figure:
    """Predictions beside targets, both [m, K]: a colour per output."""
    figure = Figure((4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    for index, colour in zip(range(targets.shape[1]), COLOURS, strict=False):
        x, y = (spread(v[:, index], POINTS) for v in (targets, predicted))
        look = dict(color=colour, s=8, linewidths=0, alpha=0.6)
        axis.scatter(x, y, rasterized=len(x) > VECTORS, **look)
    axis.axline((0.0, 0.0), slope=1, color=SOFT, linewidth=1)
    axis.set(xlabel="target", ylabel="prediction")
    low, high = targets.min(), targets.max()
    room = 0.05 * (high - low) or 1.0
    axis.set(xlim=(low - room, high + room))
    return figure


@_as_svg
def followed(outputs: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Figure:
    """The first output and its target over the real tokens of sequences [n, L, K]."""
    figure, axes = _panels(len(mask), 1, 1.5)
    for axis, y, target, real in zip(axes[:, 0], outputs, targets, mask, strict=True):
        for line, colour, label in ((target, SOFT, "target"), (y, AFTER, "prediction")):
            look = dict(rasterized=len(line) > VECTORS, label=label)
            axis.plot(line[real, 0], color=colour, **look)
    axes[0, 0].legend(loc="upper right")
    axes[-1, 0].set_xlabel("token")
    return figure


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
