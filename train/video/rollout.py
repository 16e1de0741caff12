"""Open-loop rollouts of a video model: it sees a context and then its own answers.

    python -m train.video.rollout --workdir runs/video-moving_digits-0 [--split test]
        [--context 10] [--horizon 30] [--clips 64] [--sample SEED]
        [--fvd FILE] [--lpips FILE]

writes rollout.json (scores of every predicted frame and their mean, beside those of a
model that repeats the last frame it saw), rollout.png and rollout.gif into the workdir.
Codes are the likeliest, or drawn with --sample; shown as pixels they are scored against
what the codec makes of the true codes, not against the frames that it was given. FVD
and LPIPS need the network of their authors as a TorchScript file.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from layers.frames.images import from_bytes, to_bytes
from layers.models.build import build
from layers.models.video import Video
from train import checkpoint, data, evaluate, files, runs, settings, signals
from train.data.pipeline import Dataset
from train.data.spec import Spec
from train.data.video import whole_clips
from train.video import codec, pictures
from train.video import metrics as video_metrics

JSON, PNG, GIF = "rollout.json", "rollout.png", "rollout.gif"
COPY = "copy last frame"
NUMBERS = ("context", "horizon", "clips")  # of config.rollout and the command
NETWORKS = {"fvd": video_metrics.fvd, "lpips": video_metrics.lpips}
SHOWN = 4  # clips of the contact sheet
TABLE = (1, 2, 5, 10, 20, 30, 50, 100, 200, 400, 800, 1200)  # printed horizons


class Rollout(NamedTuple):
    """True and predicted frames of some clips, uint8 [n, T, h, w, C]; codes
    [n, T, h, w] where nothing is known that makes pixels of them.

    finite [n, horizon]: whether the predicted frames are finite; those that are not are
    drawn as grey and have no score.
    """

    context: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    finite: np.ndarray

    def frames(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Context, truth and prediction, to look at."""
        return self.context, self.truth, self.prediction


@functools.partial(jax.jit, static_argnames=("model", "horizon"))
def open_loop(model, variables, context, horizon, actions=None, key=None):
    """Frames T, ..., T + horizon - 1 of clips whose first T frames are `context`.

    The context is read in one call; then every answer is the next input.

    Args:
        model: a `layers.models.video.Video`; variables: of it.
        context: pixels [B, T, h, w, C], uint8 or in [-1, 1], or codes [B, T, h, w].
        horizon: frames to predict, at least 1.
        actions: int [B, T + horizon - 1], the one at t leading from frame t to t + 1;
            for a model that takes them.
        key: to draw codes at random; None takes the likeliest.

    Returns:
        Pixels in [-1, 1] or codes, [B, horizon, ...].

    Raises:
        ValueError: a horizon below 1, actions of another length, and what the model
            raises.
    """
    if horizon < 1:
        raise ValueError(f"horizon: must be at least 1, got {horizon}")
    _check_actions(actions, (len(context), context.shape[1] + horizon - 1))

    def model_inputs(frames, start):
        if actions is None:
            return frames
        return {
            "frames": frames,
            "actions": jax.lax.dynamic_slice_in_dim(
                actions, start, frames.shape[1], axis=1
            ),
        }

    def next_frame(y, t):
        if not model.vocab_size:
            return jnp.clip(y, -1.0, 1.0)
        if key is None:
            return jnp.argmax(y, axis=-1)
        return jax.random.categorical(jax.random.fold_in(key, t), y)

    def step(carry, t):
        frame, state = carry
        y, state = model.apply(variables, model_inputs(frame, t), state)
        new = next_frame(y, t)
        return (new, state), frame[:, 0]

    T = context.shape[1]
    frames = context if model.vocab_size else from_bytes(context)
    y, state = model.apply(variables, model_inputs(frames, 0))
    first = next_frame(y[:, -1:], T - 1)
    (last, _), predicted = jax.lax.scan(
        step, (first, state), jnp.arange(T, T + horizon - 1)
    )
    predicted = jnp.moveaxis(predicted, 0, 1)
    return jnp.concatenate([predicted, last], axis=1)


def _check_actions(actions, shape):
    # A slice beyond the end would silently be the last one there is.
    if actions is not None and actions.shape != shape:
        raise ValueError(
            f"actions: must be integers [B, T + horizon - 1] = {shape}, got shape "
            f"{actions.shape}"
        )


def lengths(options: Mapping, spec: Spec) -> tuple[int, int]:
    """(context, horizon) that `options` ask for; 0: half of the clips of `spec`.

    Raises:
        ValueError: a negative number.
    """
    half = (spec.length + 1) // 2
    context, horizon = options["context"] or half, options["horizon"] or half
    for name, value in (("context", context), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"rollout.{name} must be 0 or more, got {value}")
    return context, horizon


def dataset_of(config: Mapping, spec: Spec) -> tuple[Dataset, int, int]:
    """The dataset of a run with clips of context + horizon frames, context, horizon.

    Raises:
        ValueError: rollouts that `config` asks for and cannot have: of clips that are
            shorter, of a context that is more than the model reads at once, or with a
            codec that does not fit.
    """
    clips = config["rollout"]["clips"]
    if clips < 1:
        raise ValueError(f"rollout.clips must be 1 or more, got {clips}")
    context, horizon = lengths(config["rollout"], spec)
    frame = math.prod(spec.size) * spec.channels
    settings.check_memory(
        "rollout.context, rollout.horizon", (context + horizon) * frame, "a clip"
    )
    try:
        dataset = data.load({**config["data"], "length": context + horizon})
    except ValueError as problem:
        raise ValueError(
            f"rollout.context + rollout.horizon is {context} + {horizon} frames: "
            f"{problem}"
        ) from problem
    _check_context(config["model"], dataset.spec, context)
    _codec(dataset.spec, config["model"]["vocab_size"])
    return dataset, context, horizon


def _check_context(model: Mapping, spec: Spec, context: int) -> None:
    shape = 1, context, *spec.size
    if spec.vocab_size:
        frames = jax.ShapeDtypeStruct(shape, jnp.int32)
    else:
        frames = jax.ShapeDtypeStruct((*shape, spec.channels), jnp.uint8)
    if spec.actions:
        actions = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
        frames = {"frames": frames, "actions": actions}
    try:
        jax.eval_shape(build(model).init, {"params": jax.random.key(0)}, frames)
    except ValueError as problem:
        raise ValueError(
            f"rollout.context is {context} frames, which the model does not read in "
            f"one call: {problem}"
        ) from problem


def _codec(spec: Spec, codes: int) -> Callable | None:
    """What shows `codes` different codes as pixels, or None where nothing is known."""
    if not spec.codec:
        return None
    try:
        return codec.load_codec(spec.codec, codes=codes)
    except (ValueError, checkpoint.CheckpointError) as problem:
        raise ValueError(f"data.codec: {problem}") from problem


def roll(
    model, variables, dataset, split, context, horizon, count, batch, sample=None
) -> Rollout:
    """The first `count` clips of a split, `batch` of them at a time; codes are drawn
    with the seed `sample`, the likeliest ones taken with None."""
    clips, predictions = [], []
    count = min(count, dataset.num_examples(split))
    batches = signals.stoppable(dataset.evaluation(split, min(batch, count)))
    for part, rows in enumerate(batches):
        real = rows["mask"].any(axis=1)
        videos, actions = whole_clips(rows)
        past, key = videos[:, :context], None
        if sample is not None:
            key = jax.random.fold_in(jax.random.key(sample), part)
        future = open_loop(model, variables, past, horizon, actions, key)
        clips.append(videos[real])
        predictions.append(_shown(np.asarray(future)[real]))
        if sum(map(len, clips)) >= count:
            break
    clips, prediction, finite = (
        np.concatenate(x)[:count] for x in (clips, *zip(*predictions, strict=True))
    )
    rollout = Rollout(clips[:, :context], clips[:, context:], prediction, finite)
    codec = _codec(dataset.spec, model.vocab_size)
    return Rollout(*map(codec, rollout.frames()), finite) if codec else rollout


def _shown(frames):
    """Pixels as bytes and where they are finite, [n, horizon]; codes as they are."""
    if not np.issubdtype(frames.dtype, np.floating):
        return frames, np.ones(frames.shape[:2], bool)
    return to_bytes(frames), np.isfinite(frames).all((2, 3, 4))


def horizon_scores(rollout: Rollout) -> dict:
    """{"model" and "copy last frame": {metric: [horizon]}}: "psnr" in dB, "ssim" and
    "mse", means over clips, NaN where a clip's frame is not finite; of codes the
    "accuracy", the share that is right."""
    repeated = video_metrics.copy_last(rollout.context, rollout.truth.shape[1])
    by_name = {}
    for name, prediction, finite in (
        ("model", rollout.prediction, rollout.finite),
        (COPY, repeated, True),
    ):
        if rollout.truth.ndim == 5:
            values = video_metrics.frame_metrics(rollout.truth, prediction)
        else:
            values = {"accuracy": (rollout.truth == prediction).mean((2, 3))}
        by_name[name] = {
            k: [float(x) for x in np.where(finite, v, np.nan).mean(axis=0)]
            for k, v in values.items()
        }
    return by_name


def of_run(
    run: runs.Run, options: Mapping, split: str = "test", sample: int | None = None
) -> Rollout:
    """Rollouts of a trained run; `options` has "context", "horizon" and "clips", and
    `sample` is the seed of codes that are drawn.

    Raises:
        ValueError: a run that is no video model's, or clips that are too short.
    """
    if not isinstance(run.model, Video):
        raise ValueError(
            f"workdir: must be of a video model, got {type(run.model).__name__}; "
            "configs/video.py trains one"
        )
    config = {**run.config, "rollout": options}
    dataset, context, horizon = dataset_of(config, run.dataset.spec)
    batch = run.config.train.eval_batch_size or run.config.train.batch_size
    arguments = dataset, split, context, horizon, options["clips"], batch, sample
    return roll(run.model, run.variables, *arguments)


def check(config: Mapping, spec: Spec, model: nn.Module) -> None:
    """Raises a `ValueError` for rollouts that `predict` could not make at the end."""
    if isinstance(model, Video):
        dataset_of(config, spec)


def predict(run: runs.Run, workdir: Path) -> dict:
    """Open-loop rollouts of the test split (or the last there is), their scores and
    their files in `workdir`; nothing of a model that is no `Video`."""
    if not isinstance(run.model, Video):
        return {}
    split = runs.last_split(run.dataset)
    rollout = of_run(run, run.config.rollout, split)
    record = summary(run, rollout, split)
    if jax.process_index() == 0:
        write(workdir, rollout, record)
        show(record)
    return {"rollout": record}


def write(workdir: str | Path, rollout: Rollout, record: dict) -> None:
    """rollout.json with `record`, a `summary`, rollout.png and rollout.gif."""
    workdir = Path(workdir)
    text = json.dumps(record, indent=2) + "\n"
    files.write_atomically(workdir / JSON, text)
    if rollout.truth.ndim == 5:
        frames = rollout.frames()
        sheet = pictures.contact_sheet(*(x[:SHOWN] for x in frames))
        files.write_atomically(workdir / PNG, sheet)
        film = pictures.gif(*(x[0] for x in frames))
        files.write_atomically(workdir / GIF, film)


def by_horizon(record: dict) -> tuple[list[str], list[tuple[str, ...]]]:
    """The columns of a table of scores, some frames ahead and the mean over all, and
    its rows (name, score, ...)."""
    length = len(next(iter(record["scores"]["model"].values())))
    horizons = [t for t in TABLE if t < length] + [length]
    rows = []
    for name, metrics in record["scores"].items():
        for metric, values in metrics.items():
            row = [*(values[t - 1] for t in horizons), sum(values) / length]
            rows.append((f"{name}, {metric}", *(f"{x:.4g}" for x in row)))
    return [*(f"+{t}" for t in horizons), "mean"], rows


def show(record: dict) -> None:
    """Prints the scores at some horizons."""
    columns, rows = by_horizon(record)
    table = Table(
        title=f"{record['clips']} clips of the {record['split']} split after "
        f"{record['context']} frames of context, against {record['against']}"
    )
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.video.rollout")
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: newest")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, help="default: as the config says")
    parser.add_argument(
        "--sample", type=int, metavar="SEED", help="draw codes; default: the likeliest"
    )
    parser.add_argument("--fvd", default="", help="I3D as a TorchScript file")
    parser.add_argument("--lpips", default="", help="LPIPS as a TorchScript file")
    evaluate.add_trust(parser)
    arguments = parser.parse_args(argv)
    try:
        workdir = settings.place("--workdir", arguments.workdir)
        run = runs.load_run(workdir, arguments.step, arguments.trust)
        options = {name: run.config.rollout[name] for name in NUMBERS}
        for name in options:
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
            settings.check(f"rollout.{name}", options[name], 0)
        _check_sample(run, arguments.sample)
        rollout = of_run(run, options, arguments.split, arguments.sample)
        record = summary(run, rollout, arguments.split)
        write(workdir, rollout, record)  # networks may yet ask for too much
        record |= _by_networks(rollout, arguments)
        write(workdir, rollout, record)
    except evaluate.PROBLEMS as problem:
        parser.error(str(problem))
    show(record)
    for name in NETWORKS:
        print(f"{name}: {record[name]}")
    return 0


def _check_sample(run: runs.Run, sample: int | None) -> None:
    if sample is not None:
        settings.check_seed("--sample", max(sample, 0))
    if sample is not None and (sample < 0 or not run.config.model.vocab_size):
        raise ValueError(
            "--sample must be a seed, 0 or more, for a model of codes; a model of "
            f"pixels draws nothing; got {sample}"
        )


def summary(run: runs.Run, rollout: Rollout, split: str) -> dict:
    """What rollout.json holds."""
    by_name = horizon_scores(rollout)
    if rollout.truth.ndim != 5:
        against = "the true codes"
    elif run.model.vocab_size:
        against = "the true codes as the codec shows them"
    else:
        against = "the true frames"
    return {
        "step": run.step,
        "split": split,
        "clips": len(rollout.truth),
        "context": rollout.context.shape[1],
        "against": against,
        "scores": by_name,
        "mean": {
            name: {k: float(np.mean(v)) for k, v in metrics.items()}
            for name, metrics in by_name.items()
        },
    }


def _by_networks(rollout, arguments) -> dict:
    """FVD and LPIPS, or why there are none."""
    results = {}
    for name, metric in NETWORKS.items():
        network = getattr(arguments, name)
        reason = video_metrics.unavailable(name.upper(), network)
        if reason:
            results[name] = reason
        elif not rollout.finite.all():
            results[name] = "none: the model predicted non-finite frames"
        else:
            results[name] = float(
                np.mean(metric(rollout.truth, rollout.prediction, network))
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
