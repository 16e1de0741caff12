"""Clips of video: pairs of a frame and the next, and arrays of the user that hold them.

A clip of T frames is T - 1 pairs: inputs are the frames 0, ..., T - 2, targets the
frames 1, ..., T - 1, both uint8 [L, h, w, C], or int32 [L, h, w] where a frame is a
grid of codes. With actions, inputs are {"frames": those, "actions": int32 [L]}, the
action at t being the one that leads from frame t to frame t + 1.
"""

import functools
from collections.abc import Mapping

import numpy as np

from train.data import pipeline
from train.data.own import File, drawn_split, given_split, read_npz
from train.data.sources import Example, split_rows
from train.data.spec import Spec

KEYS = ("frames", "codes", "actions", "split")

CHANNELS = (1, 3)


def clips(
    path: str = "",
    length: int = 0,
    vocab_size: int = 0,
    actions: int = 0,
    codec: str = "",
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> pipeline.Dataset:
    """n clips from an NPZ, `numpy.savez(path, frames=...)`, which has

        frames   uint8 [n, T, h, w, C], C being 1 or 3, or [n, T, h, w]
        codes    instead: integers [n, T, h, w], a frame being a grid of codes
        actions  integers [n, T], each leading to the frame beside it     (optional)
        split    [n] of "train", "validation", "test"                     (optional)

    The first action of a clip leads to nothing that is predicted: it is not read.

    Args:
        path: of the file.
        length: frames that are taken of a clip: anywhere when training, the first ones
            else. 0: all.
        vocab_size: number of codes; 0 takes the largest one plus 1.
        actions: number of actions; 0: the largest one plus 1 where the file has them.
        codec: workdir of the autoencoder that makes pixels of the codes.
        validation, test: fractions: test of all clips, validation of the rest. Not read
            where the file has "split".
        seed: of the division.

    Raises:
        ValueError: a file that cannot be read so; names the file and the key, what
            stands there and what may.
    """
    source = File(path, (".npz",))
    raw = read_npz(source, KEYS, required=())
    if ("frames" in raw) == ("codes" in raw):
        fault = "and codes are both there" if "frames" in raw else "is missing"
        raise source.error(
            "frames", f"{fault}; the file must have one of frames, codes"
        )
    if "frames" in raw:
        values, spec = _read_pixels(source, raw["frames"])
        for name, value in (("codec", codec), ("vocab_size", vocab_size)):
            if value:
                raise ValueError(
                    f"data.{name} is about codes, but {source.path} has frames; it "
                    f"must be {type(value)()!r}, got {value!r}"
                )
    else:
        values, spec = _read_codes(source, raw["codes"], vocab_size)
        spec = spec.but(codec=codec)
    arrays = {"frames": values}
    count, frames = values.shape[:2]
    length = length or frames
    if not 2 <= length <= frames:
        raise ValueError(
            f"data.length must lie between 2 and {frames}, the frames of a clip in "
            f"{source.path}, or be 0, got {length}"
        )
    spec = spec.but(length=length - 1)
    if "actions" in raw:
        led = _read_actions(source, raw["actions"], (count, frames), actions)
        arrays["actions"] = led[0]
        spec = spec.but(actions=led[1])
    elif actions:
        raise source.error(
            "actions",
            f"is missing, but data.actions is {actions}; it must be 0, or the file "
            "must have integers [n, T]",
        )
    if "split" in raw:
        indices = given_split(source, raw["split"])
    else:
        indices = drawn_split(source, count, validation, test, seed)
    sources = split_rows(arrays, indices)
    window = functools.partial(window_of, length=length)
    return pipeline.Dataset(
        spec, sources, window, functools.partial(pairs, length=length)
    )


def _read_pixels(source: File, frames: np.ndarray):
    """Frames [n, T, h, w, C] and their spec."""
    may = "it must be uint8 [n, T, h, w, C] with 1 or 3 channels C, or [n, T, h, w]"
    if frames.dtype != np.uint8:
        raise source.error("frames", f"is {frames.dtype} {frames.shape}; {may}")
    shape = frames.shape
    if frames.ndim == 4:
        frames = frames[..., None]
    if frames.ndim != 5 or frames.shape[-1] not in CHANNELS:
        raise source.error("frames", f"has shape {shape}; {may}")
    _check_extent(source, "frames", shape)
    return frames, pixels_spec(frames.shape[2:4], frames.shape[-1])


def _read_codes(source: File, codes: np.ndarray, vocab_size: int):
    """Codes [n, T, h, w] and their spec."""
    if codes.ndim != 4 or codes.dtype.kind not in "iu":
        raise source.error(
            "codes", f"is {codes.dtype} {codes.shape}; it must be integers [n, T, h, w]"
        )
    _check_extent(source, "codes", codes.shape)
    codes, vocab_size = source.whole("codes", codes, 0, vocab_size)
    spec = pixels_spec(codes.shape[2:], 1)
    return codes, spec.but(vocab_size=vocab_size, outputs=vocab_size, loss="codes")


def _check_extent(source: File, key: str, shape: tuple[int, ...]) -> None:
    if 0 in shape or shape[1] < 2:
        raise source.error(
            key,
            f"has shape {shape}; T must be 2 or more, a frame to see and one to "
            "predict, and every other axis 1 or longer",
        )


def _read_actions(source: File, actions, shape: tuple[int, int], number: int):
    if actions.shape != shape or actions.dtype.kind not in "iu":
        raise source.error(
            "actions",
            f"is {actions.dtype} {actions.shape}; it must be integers [n, T] = {shape}",
        )
    # The first one is not read, so that it must be anything, such as -1.
    read, number = source.whole("actions", actions[:, 1:], 0, number)
    return np.concatenate([np.zeros_like(read[:, :1]), read], axis=1), number


def window_of(example, rng: np.random.Generator, length: int):
    """`length` frames from anywhere, and what goes with them."""
    start = rng.integers(len(example["frames"]) - length + 1)
    return {name: values[start : start + length] for name, values in example.items()}


def pairs(example: Example, length: int) -> Example:
    """The first `length` frames as inputs and targets."""
    frames = example["frames"][:length]
    inputs = frames[:-1]
    if "actions" in example:
        inputs = {"frames": inputs, "actions": example["actions"][1:length]}
    return {
        "inputs": inputs,
        "targets": frames[1:],
        "mask": np.ones(length - 1, bool),
    }


def whole_clips(batch) -> tuple[np.ndarray, np.ndarray | None]:
    """The clips [B, T, ...] of a batch of pairs, and its actions [B, T - 1] or None."""
    inputs = batch["inputs"]
    parts = inputs if isinstance(inputs, Mapping) else {"frames": inputs}
    last = batch["targets"][:, -1:]
    clips = np.concatenate([parts["frames"], last], axis=1)
    return clips, parts.get("actions")


def pixels_spec(size: tuple[int, int], channels: int, length: int = 0) -> Spec:
    """The spec of clips of `length` frames."""
    return Spec(
        encoder="video",
        size=tuple(size),
        channels=channels,
        length=length - 1,
        vocab_size=0,
        outputs=channels,
        actions=0,
        loss="frames",
        padded=False,
        causal=True,
    )
