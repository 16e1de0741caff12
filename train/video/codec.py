"""Clips as grids of codes: what a trained autoencoder of frames makes of its dataset.

    python -m train.video.codec --workdir runs/vq --clips 1000 --out clips.npz

The NPZ is one that the dataset "clips" reads: data.path=clips.npz, with data.codec the
same workdir, so that what a model of codes predicts can be shown as pixels.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from layers.frames.images import to_bytes
from train import data, files, settings
from train.data import sources
from train.data.video import whole_clips
from train.evaluate import PROBLEMS, add_trust
from train.records import read_config
from train.runs import Run, load_run

FRAMES = 512  # encoded or decoded at once


def load_codec(workdir: str | Path, at: int | None = None, codes: int = 0) -> Callable:
    """What shows codes as pixels: integers [B, L, h', w'] or [B, h', w'] -> uint8
    frames [B, L, h, w, C] or [B, h, w, C], NumPy to NumPy.

    Args:
        workdir: of a trained autoencoder (model.layer "vq").
        at: step of its checkpoint; None: the newest good one.
        codes: how many different ones it must show at least.

    Raises:
        ValueError: no such run, one of another model or of fewer codes; and by the
            function, for codes of another shape or beyond those there are.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    run = _autoencoder(workdir, at)
    if codes > run.model.codes:
        raise ValueError(
            f"workdir: {workdir} has {run.model.codes} codes, but {codes} are to be "
            "shown, as many as data.vocab_size or the clips say"
        )
    pixels_of = _framewise(run, "decode", 2)

    def decode(codes: np.ndarray) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < run.model.codes:
            raise ValueError(
                f"codes: must lie in [0, {run.model.codes}), got {codes.min()} to "
                f"{codes.max()}"
            )
        return to_bytes(pixels_of(codes))

    return decode


def encode(run: Run, split: str, count: int) -> dict[str, np.ndarray]:
    """The first `count` clips of a split, or all there are, as the arrays of the
    dataset "clips": codes int32 [n, T, h', w'], split [n] and, where the data have
    them, actions int32 [n, T], the first of which leads from nowhere and is 0.

    `ValueError` for a count below 1 or a split that the dataset does not have.
    """
    if count < 1:
        raise ValueError(f"clips: must be at least 1, got {count}")
    count = min(count, run.dataset.num_examples(split))
    codes_of, parts = _framewise(run, "encode", 3), []
    for batch in itertools.islice(run.dataset.evaluation(split, 1), count):
        clip, actions = whole_clips(batch)
        part = {"codes": codes_of(clip)}
        if actions is not None:
            part["actions"] = np.pad(actions, ((0, 0), (1, 0)))
        parts.append(part)
    arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return {**arrays, "split": np.full(count, split)}


def _framewise(run: Run, method: str, rank: int) -> Callable:
    """A method of the model on NumPy arrays [..., frame], whose last `rank` axes are a
    frame's, FRAMES at a time."""
    apply = jax.jit(lambda x: run.model.apply(run.variables, x, method=method))

    def in_parts(x):
        frames = x.reshape(-1, *x.shape[-rank:])
        parts = [
            np.asarray(apply(frames[i : i + FRAMES]))
            for i in range(0, len(frames), FRAMES)
        ]
        answers = np.concatenate(parts)
        return answers.reshape(*x.shape[:-rank], *answers.shape[1:])

    return in_parts


def write(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an NPZ. `ValueError` where that cannot be: then what was at `path` before
    is still there."""
    path, buffer = _checked(path), io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    try:
        files.write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise ValueError(f"out: {path} cannot be written: {error.strerror}") from error


def _checked(path) -> Path:
    path = settings.place("out", path)
    if path.suffix != ".npz" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"out: must be an .npz file in a folder that exists, got {str(path)!r}"
        )
    return path


def _autoencoder(workdir, at) -> Run:
    layer = read_config(workdir).model.layer
    if layer != "vq":  # nothing else is built, so that no other layer is imported
        raise ValueError(
            f"workdir: {workdir} must be of an autoencoder, model.layer 'vq', got "
            f"{layer!r}"
        )
    return load_run(workdir, at)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.video.codec",
        description="Encodes the clips of a trained autoencoder's dataset.",
    )
    parser.add_argument("--workdir", required=True, help="of a trained autoencoder")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    parser.add_argument(
        "--split", help="one or several joined by commas; default: all there are"
    )
    parser.add_argument("--clips", type=int, default=1000, help="of each split at most")
    parser.add_argument(
        "--length", type=int, help="frames of a clip; default: the run's"
    )
    parser.add_argument("--out", required=True, help="the .npz to write")
    add_trust(parser)
    options = parser.parse_args(argv)
    try:
        _checked(options.out)  # now, not after the work
        run = _autoencoder(options.workdir, options.step)
        if options.length is not None:
            run = run.on(data.load({**run.config.data, "length": options.length}))
        splits = [split for split in sources.SPLITS if split in run.dataset.sources]
        if options.split:
            splits = options.split.split(",")
        parts = [encode(run, split, options.clips) for split in splits]
        arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        write(options.out, arrays)
    except PROBLEMS as problem:
        parser.error(str(problem))
    print(
        f"{options.out}: {len(arrays['codes'])} clips of {run.model.codes} codes, "
        f"{arrays['codes'].shape[1:]}; for the dataset clips, data.vocab_size="
        f"{run.model.codes}, data.codec={options.workdir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
