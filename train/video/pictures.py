"""Rollouts to look at: a sheet of frames as PNG, strips of them for a page, a film as
GIF.

Frames are uint8, or floats in [0, 1], [..., h, w, C] with 1 or 3 channels.
"""

import io

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from train.draw.figures import AFTER, SOFT, STYLE, WIDTH, png, spread
from train.draw.markup import Panel, image
from train.video.metrics import check_frames

CONTEXTS, HORIZONS = 3, 6  # columns of a sheet
FILM_CONTEXT, FILM_HORIZON = 20, 200  # frames of a film
FILM_SIDE = 160  # pixels at least, of a frame in it
MILLISECONDS = 80  # a frame


def contact_sheet(context, truth, prediction) -> bytes:
    """A PNG: two rows per clip, the truth and the prediction; columns are some frames
    of the context and of what follows it, the first and the last among them.

    Args:
        context: [n, T, h, w, C].
        truth, prediction: [n, H, h, w, C].

    Raises:
        ValueError: frames of another form.
    """
    context, truth, prediction = _frames(context, truth, prediction, 5)
    contexts, horizons = _columns(context, truth)
    with matplotlib.rc_context(STYLE):
        columns, rows = len(contexts) + len(horizons), 2 * len(truth)
        side = WIDTH / columns
        height = rows * side * truth.shape[2] / truth.shape[3] + 0.3
        figure = Figure((WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02)
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for clip, (upper, lower) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
            for axis, t in zip(upper, contexts, strict=False):
                _show(axis, context[clip, t])
            for i, t in enumerate(horizons, len(contexts)):
                _show(upper[i], truth[clip, t])
                _show(lower[i], prediction[clip, t])
            for axis, label in (
                (upper[0], "truth"),
                (lower[len(contexts)], "prediction"),
            ):
                # Readable on a dark page and on a light one, as a PNG has no page.
                axis.set_ylabel(label, color=SOFT, fontsize=8)
        labels = _labels(contexts, horizons)
        for axis, label in zip(axes[0], labels, strict=True):
            axis.set_title(label, color=SOFT, fontsize=8)
        return _png(figure)


def strips(context, truth, prediction) -> list[list[Panel]]:
    """The frames of `contact_sheet`, one by one so that a narrow page breaks the row:
    of each clip those seen, then the truth above the prediction.

    Args:
        context: [n, T, h, w, C].
        truth, prediction: [n, H, h, w, C].

    Raises:
        ValueError: frames of another form.
    """
    context, truth, prediction = _frames(context, truth, prediction, 5)
    contexts, horizons = _columns(context, truth)
    labels = _labels(contexts, horizons)
    strips = []
    for clip, target, answer in zip(context, truth, prediction, strict=True):
        cells = [image(png(clip[t]), f"seen, frame {t + 1}") for t in contexts]
        for t in horizons:
            upper = image(png(target[t]), f"truth, +{t + 1}")
            lower = image(png(answer[t]), f"prediction, +{t + 1}")
            cells.append(upper + lower)
        strips.append([Panel(*cell) for cell in zip(labels, cells, strict=True)])
    return strips


def _columns(context, truth) -> tuple[np.ndarray, np.ndarray]:
    """The frames of the context and of what follows that are shown."""
    T, H = context.shape[1], truth.shape[1]
    return spread(np.arange(T), CONTEXTS), spread(np.arange(H), HORIZONS)


def _labels(contexts, horizons) -> list[str]:
    return [f"seen {t + 1}" for t in contexts] + [f"+{t + 1}" for t in horizons]


def gif(context, truth, prediction) -> bytes:
    """An animated GIF of one clip: the context, then the truth beside the prediction.

    The bar on top is grey while the right side shows the context too. Of a long clip
    the last FILM_CONTEXT frames of context are shown and FILM_HORIZON evenly spaced
    ones of what follows.

    Args:
        context: [T, h, w, C].
        truth, prediction: [H, h, w, C].

    Raises:
        ValueError: frames of another form.
    """
    from PIL import Image  # only needed here

    context, truth, prediction = _frames(context, truth, prediction, 4)
    context = context[-FILM_CONTEXT:]
    left = np.concatenate([context, spread(truth, FILM_HORIZON)])
    right = np.concatenate([context, spread(prediction, FILM_HORIZON)])
    scale = max(1, -(-FILM_SIDE // max(left.shape[1:3])))
    film = []
    for t, pair in enumerate(zip(left, right, strict=True)):
        colour = SOFT if t < len(context) else AFTER
        film.append(Image.fromarray(_beside(*pair, scale, colour)))
    out = io.BytesIO()
    film[0].save(
        out,
        format="GIF",
        save_all=True,
        append_images=film[1:],
        duration=MILLISECONDS,
        loop=0,
    )
    return out.getvalue()


def _beside(left: np.ndarray, right: np.ndarray, scale: int, colour: str):
    """Two frames, enlarged, below a bar whose part over the right one is coloured."""
    pair = [x.repeat(scale, 0).repeat(scale, 1) for x in (left, right)]
    pair = [np.broadcast_to(x, (*x.shape[:2], 3)) for x in pair]
    height, width = pair[0].shape[:2]
    gap = 4
    canvas = np.full((height + gap, 2 * width + gap, 3), 255, np.uint8)
    canvas[gap:, :width], canvas[gap:, -width:] = pair
    canvas[:gap, :width] = _rgb(SOFT)
    canvas[:gap, -width:] = _rgb(colour)
    return canvas


def _rgb(colour: str) -> np.ndarray:
    return np.rint(255 * np.array(to_rgb(colour))).astype(np.uint8)


def _show(axis, frame) -> None:
    frame = np.broadcast_to(frame, (*frame.shape[:2], 3))
    axis.imshow(frame, interpolation="nearest")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    metadata = {"Software": None}  # the same bytes from every version
    figure.savefig(out, format="png", transparent=True, metadata=metadata)
    return out.getvalue()


def _frames(context, truth, prediction, rank: int):
    """All three as uint8."""
    if truth.shape != prediction.shape:
        raise ValueError(
            f"prediction must have the shape of truth, {truth.shape}, got "
            f"{prediction.shape}"
        )
    axes = "[n, T, h, w, C]" if rank == 5 else "[T, h, w, C]"
    frames = dict(context=context, truth=truth, prediction=prediction)
    for name, values in frames.items():
        check_frames(name, values, rank, axes)
        shape, expected = (x.shape[: rank - 4] + x.shape[-3:] for x in (values, truth))
        if shape != expected or expected[-1] not in (1, 3):
            raise ValueError(
                f"{name} must have as many clips as truth, frames of its size and 1 or "
                f"3 channels; they have shapes {values.shape} and {truth.shape}"
            )
    return tuple(_bytes(np.asarray(values)) for values in frames.values())


def _bytes(frames: np.ndarray) -> np.ndarray:
    if frames.dtype == np.uint8:
        return frames
    # NaN is drawn black.
    return np.rint(255 * np.nan_to_num(frames.astype(np.float32))).astype(np.uint8)
