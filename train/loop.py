"""One run: set up, restore, train, evaluate."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from layers.models import grid
from layers.models.build import build
from layers.models.video import Video
from train import (
    checkpoint,
    data,
    files,
    flight,
    losses,
    optimizers,
    processes,
    record,
    settings,
    sharding,
    state,
    step,
)
from train.checkpoint import CheckpointError, Checkpoints
from train.endings import finish, measure
from train.metrics import Metrics
from train.pace import Pace
from train.record import SCORES
from train.signals import Stopped, stop_signals
from train.video import rollout

REMEMBERED = ("step", "best", "window", "unvalidated")  # beside the state
PROFILED = 2, 6  # first and last step of the trace, counted from the start


def run(
    config: ConfigDict,
    workdir: str | Path,
    profile: bool = False,
    model: nn.Module | None = None,
) -> dict:
    """Trains what `config` says in `workdir`, or goes on with what was begun there.

    Args:
        config: `configs.common.base()` with a task's changes.
        workdir: gets config.json, versions.json, metrics.jsonl, tensorboard/,
            checkpoints/ and, at the end, results.json.
        profile: also writes a trace of five steps, or of as many as there are, to
            workdir/profile.
        model: instead of `build(config.model)`.

    Returns:
        What results.json holds; {"step", "stopped"} if a signal ended the run early.

    Raises:
        ValueError: a setting that cannot be, or a workdir that is of another config,
            in use by another run, or not to be written.
        CheckpointError: a checkpoint cannot be written or read, or the disk is full.
        FloatingPointError: loss, gradient or state are not finite.
    """
    settings.check_types(config)
    with stop_signals() as stop:
        stop.nothing_to_save("setting up")
        return _run(config, Path(workdir).absolute(), profile, model, stop)


def _run(config, workdir, profile, model, stop) -> dict:
    dataset = data.load(config.data)
    begun_with = record.saved(workdir, "optimizer.warmup")
    config = record.continued(workdir, resolve(config, dataset.spec, begun_with))
    mesh = sharding.make_mesh(config)
    check(config, mesh)
    model = build(config.model) if model is None else model
    if dataset.spec.get("causal"):
        check_causal(model)
    if isinstance(model, Video):
        rollout.dataset_of(config, dataset.spec)  # raises now, not after training
    # A finished run is told of also where nothing can be written.
    if not os.access(workdir, os.W_OK) and (
        finished := finished_before(config, workdir)
    ):
        return finished
    with processes.held(workdir) as own:
        return finished_before(config, workdir) or go_on(
            config, workdir, dataset, mesh, model, profile, stop, own
        )


def go_on(config, workdir, dataset, mesh, model, profile, stop, own) -> dict:
    """What `run` does in a workdir that is its own and not finished."""
    record.check_writable(workdir)
    try:
        with Checkpoints(workdir, config.train.keep, own.check) as checkpoints:
            parts = set_up(config, dataset, mesh, model, stop)
            # Only now: what cannot be set up leaves nothing behind.
            record.write_config(workdir, config)
            record.write_versions(workdir)
            progress = start(config, workdir, parts, checkpoints)
            train(config, workdir, parts, progress, checkpoints, stop, profile)
    except OSError as error:
        full, place = files.disk_full(error), error.filename or "a file"
        if not full and not str(place).startswith(str(workdir)):
            raise
        raise CheckpointError(
            f"{'the disk is full' if full else error.strerror}: {place} cannot be "
            f"written; last good checkpoint: {checkpoint.last_good(workdir)} in "
            f"{workdir}; make {'room' if full else 'that possible'} and start the same "
            "command again"
        ) from error
    except FloatingPointError as error:
        stop.ends_after("search for what broke")
        good = checkpoint.last_good(workdir)  # known only now: saves have ended
        broken = replay(config, workdir, parts, dataset, progress.step)
        raise FloatingPointError(
            f"{error}; {broken}last good checkpoint: {good} in {workdir}. A lower "
            "optimizer.lr, a longer warmup or a smaller clip may help"
        ) from error
    if stop.signal is None:
        stop.ends_after("batch")
        with contextlib.suppress(Stopped):
            return finish(config, workdir, parts, progress)
    print(
        f"stopped by {stop.signal} at step {progress.step}; to go on from there, "
        f"start the same command again (workdir {workdir})",
        flush=True,
    )
    return {"step": progress.step, "stopped": stop.signal}


def finished_before(config: ConfigDict, workdir: Path) -> dict | None:
    """The results of a run that is finished, printed; None where there is more to do.

    Raises:
        ValueError: a workdir of another config.
    """
    record.check_workdir(workdir, config)
    try:
        finished = record.read_results(workdir)
    except ValueError as problem:  # they are made again at the end
        print(f"{problem}: the run goes on from its last checkpoint", flush=True)
        return None
    if finished is None or finished["step"] < config.train.steps:
        return None
    print(f"this run was finished before, at step {finished['step']}")
    record.report(finished)
    return finished


def resolve(config: ConfigDict, spec: Mapping, warmup: int | None = None) -> ConfigDict:
    """A copy of `config` in which the dataset fills in what the model leaves open, and
    a recipe's warmup is a number of steps: `warmup`, where the run has begun with it.

    Images stay a grid where the model has one: `length` is then that of the longest
    sequence a layer reads on it.

    Raises:
        ValueError: fewer outputs or a smaller vocabulary than the dataset has; frames
            or actions of a video that are not the dataset's.
    """
    config = config.copy_and_resolve_references()
    for key in ("vocab_size", "outputs"):
        value, least = config.model[key], spec[key]
        if value and value < least:
            raise ValueError(
                f"model.{key} must be {least} or more, what the dataset has, or 0 for "
                f"that; got {value}"
            )
    if config.model.grid and spec["encoder"] == "image":
        size = [n // max(1, config.model.patch) for n in spec["size"]]
        length = grid.longest(config.model.grid, size)
        spec = {**spec, "encoder": "grid", "length": length}
    for key in ("encoder", "length", "vocab_size", "outputs"):
        if not config.model[key]:
            config.model[key] = spec[key]
    if spec["encoder"] == "video":
        _resolve_video(config.model.video, spec)
    optimizers.settle_warmup(config, warmup)
    return config


def _resolve_video(options: ConfigDict, spec: Mapping) -> None:
    for key in ("size", "channels", "actions"):
        value, there = options[key], spec[key]
        if np.any(value) and tuple(np.ravel(value)) != tuple(np.ravel(there)):
            raise ValueError(
                f"model.video.{key} must be {there}, what the dataset has, or 0 for "
                f"that; got {value}"
            )
        options[key] = there


def check(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises a `ValueError` for numbers that are not positive or cannot be divided."""
    options = config.train
    if config.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {config.seed}")
    positive = ("steps", "eval_every", "log_every", "checkpoint_every", "keep")
    for key in (*positive, "accumulate"):
        if options[key] < 1:
            raise ValueError(f"train.{key} must be 1 or more, got {options[key]}")
    if not 0 <= options.ema < 1:
        raise ValueError(f"train.ema must lie in [0, 1), got {options.ema}")
    sharding.check_batch_size(
        "train.batch_size", options.batch_size, mesh, options.accumulate
    )
    if options.eval_batch_size:
        sharding.check_batch_size(
            "train.eval_batch_size", options.eval_batch_size, mesh
        )


def check_causal(model: nn.Module) -> None:
    """Raises a `ValueError` for a model that would read its targets from later inputs:
    one that has no recurrent mode."""
    try:
        jax.eval_shape(lambda: model.init_state(1))
    except ValueError as problem:
        raise ValueError(
            "model.layer must not read the future, where these data have the targets: "
            f"{problem}"
        ) from problem


def set_up(config, dataset, mesh, model, stop) -> SimpleNamespace:
    """What a run needs and does not change; nothing of the state is allocated yet."""
    options, spec, seed = config.train, dataset.spec, config.seed
    padded = spec.get("padded", True)
    with contextlib.closing(dataset.train(options.batch_size, seed, 0)) as batches:
        sample = sharding.place(next(batches), mesh)
    boxes = state.param_boxes(model, sample)
    shapes = nn.unbox(boxes)
    if jax.default_backend() == "cpu":
        leaves = jax.tree.leaves(shapes)
        taken = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        settings.check_memory("model", taken, "its parameters")
    optimizer, groups, schedule = optimizers.make(config, boxes)
    create = functools.partial(
        state.create, model, optimizer, sample, seed, mesh, ema=options.ema > 0
    )
    target = state.abstract(create, mesh)
    train_step = step.make_train_step(
        model,
        optimizer,
        losses.make(spec, options.label_smoothing),
        config,
        padded,
        sharding.replicated(mesh),
    )
    stop.nothing_to_save("compiling")
    print(f"compiling the training step: {_described(config, sample)}", flush=True)
    begun = time.monotonic()
    compiled = train_step.lower(target, sample).compile()
    seconds = time.monotonic() - begun
    stop.nothing_to_save("starting")
    record.print_table(config, groups, shapes, mesh, compiled, seconds)
    return SimpleNamespace(
        dataset=dataset,
        mesh=mesh,
        model=model,
        create=create,
        target=target,
        schedule=schedule,
        train_step=compiled,
        eval_step=step.make_eval_step(model, losses.make(spec), padded),
        probe=flight.make_probe(model, losses.make(spec), seed, padded),
        batches=dataset.train(options.batch_size, seed, config.data.workers),
    )


def _described(config, batch) -> str:
    """What is compiled: the model, and the largest input of a batch."""
    inputs = max(jax.tree.leaves(batch["inputs"]), key=lambda x: x.size)
    shape = " x ".join(map(str, inputs.shape))
    return (
        f"{config.model.depth} blocks of {config.model.features} features "
        f"({config.model.layer}), a batch of {shape}"
    )


def start(config, workdir, parts, checkpoints) -> SimpleNamespace:
    """Where to go on from: the own workdir, else `train.init_from`, else scratch."""
    restored = checkpoints.restore(parts.target)
    if restored is not None:
        trained, position, memory = restored
        parts.batches.set_state(position)
        print(f"resumed from step {memory['step']} in {workdir}")
        # "unvalidated" is not known to checkpoints from before it was.
        return SimpleNamespace(**{"unvalidated": False, **memory, "state": trained})
    fresh = parts.create()
    if config.train.init_from:
        fresh = checkpoint.init_from(config.train.init_from, fresh)
    return SimpleNamespace(state=fresh, step=0, best=None, window=[], unvalidated=False)


def train(config, workdir, parts, progress, checkpoints, stop, profile) -> None:
    """Advances `progress` to the last step, or until a signal stops it.

    What the steps measured stays on the device, in `progress.window`, until it is
    logged or a checkpoint is due. A validation that a signal cuts off is made at the
    next start, before any step.
    """
    options, saved = config.train, progress.step
    pace = Pace(parts.mesh)
    metrics = Metrics(workdir, progress.step, options.steps, progress.unvalidated)
    trace = profiler(workdir / "profile", progress, options.steps)
    with metrics, contextlib.closing(parts.batches), trace as between_steps:
        with contextlib.suppress(Stopped):
            if progress.unvalidated:
                with metrics.paused():
                    validate(config, parts, progress, metrics)
            while progress.step < options.steps:
                if profile:
                    between_steps()
                pace.wait()
                metrics.advance(progress.step - len(pace))
                if not may_begin(progress.step + 1, pace, parts.batches, stop):
                    break
                batch = sharding.place(next(parts.batches), parts.mesh)
                with jax.transfer_guard("disallow"):
                    progress.state, measured = parts.train_step(progress.state, batch)
                progress.step += 1
                progress.window.append(measured)
                pace.begun(measured["loss"], stop.signal is not None)
                checkpoints.poll()
                last, better = progress.step == options.steps, False
                if last or progress.step % options.log_every == 0:
                    pace.drain()
                    log(config, parts, progress, metrics, batch)
                if last or progress.step % options.eval_every == 0:
                    pace.drain()
                    progress.unvalidated = True
                    with metrics.paused():
                        better = validate(config, parts, progress, metrics)
                due = progress.step % options.checkpoint_every == 0
                if last or due or better:
                    pace.drain()
                    with metrics.paused():
                        save(parts, progress, checkpoints)
                    saved = progress.step
        pace.drain()
        metrics.advance(progress.step)
        if progress.step > saved:  # a signal came
            save(parts, progress, checkpoints)


def may_begin(step: int, pace: Pace, batches, stop) -> bool:
    """Whether `step` is to be computed: with its batch there, and no signal."""
    if jax.process_count() > 1:
        if pace.agreed():
            stop.join()
        return not pace.agreed()
    return batches.ready(lambda: stop.signal) and stop.may_begin(step)


def replay(config, workdir, parts, dataset, until: int) -> str:
    """What broke first between the last checkpoint and the step `until`, found by going
    through these steps once more; "" if it does not happen again."""
    options = config.train
    parts.batches = dataset.train(options.batch_size, config.seed, config.data.workers)
    with Checkpoints(workdir, options.keep) as checkpoints:
        begun = start(config, workdir, parts, checkpoints)
    with contextlib.closing(parts.batches) as batches:
        said = flight.find(
            parts.probe,
            parts.train_step,
            begun.state,
            batches,
            parts.mesh,
            range(begun.step + 1, until + 1),
        )
    return f"first of all, {said}; " if said else ""


def log(config, parts, progress, metrics, batch) -> None:
    """Writes the means over the steps since the last log, and of its last batch what
    the recorder shows."""
    check_window(progress)
    names = [name for name in progress.window[0] if name != "weight"]
    means = {k: float(np.mean([m[k] for m in progress.window])) for k in names}
    means["lr"] = float(parts.schedule(progress.step - 1))
    means["steps_per_second"] = metrics.rate(progress.step)
    if config.train.record:
        shown = flight.quantities(parts.probe(progress.state, batch).record)
        means |= {f"record/{name}": value for name, value in shown.items()}
    metrics.write(progress.step, "train", means)
    progress.window = []


def check_window(progress) -> None:
    """Fetches what was measured since the last log.

    Raises:
        FloatingPointError: something is not finite.
        ValueError: a batch had nothing to learn from.
    """
    progress.window = jax.tree.map(float, jax.device_get(progress.window))
    begun = progress.step - len(progress.window)
    for number, measured in enumerate(progress.window, begun + 1):
        for name, value in measured.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {number}")
        if measured["weight"] == 0:
            raise ValueError(
                f"the batch of step {number} must have a target to learn from, got "
                f"only masked ones or {losses.IGNORED}, which is ignored"
            )


def validate(config, parts, progress, metrics) -> bool:
    """Whether this step is the best on the validation split so far."""
    scores = measure(config, parts, "validation", progress.state.variables())
    progress.unvalidated = False
    if scores is None:
        return False
    if not math.isfinite(scores["loss"]):
        raise FloatingPointError(
            f"the validation loss is {scores['loss']} at step {progress.step}"
        )
    metrics.write(progress.step, "validation", scores)
    name, _, more = SCORES[parts.dataset.spec["loss"]]
    best = progress.best and progress.best["scores"][name]
    if best is not None and (scores[name] <= best if more else scores[name] >= best):
        return False
    progress.best = {"step": progress.step, "scores": scores}
    return True


def save(parts, progress, checkpoints) -> None:
    """Starts a checkpoint of a state that is known to be finite."""
    check_window(progress)
    if not step.all_finite(progress.state):
        raise FloatingPointError(f"the state is not finite at step {progress.step}")
    memory = {key: getattr(progress, key) for key in REMEMBERED}
    best = progress.best and progress.best["step"]
    checkpoints.save(progress.state, parts.batches.get_state(), memory, best)


@contextlib.contextmanager
def profiler(folder: Path, progress, steps: int):
    """Yields what is to be called before every step: it traces the steps PROFILED.

    A run with fewer steps is traced to its end, which may also be an error.
    """
    first = progress.step
    begin = first + min(PROFILED[0], steps - first) - 1

    def end():
        try:
            jax.block_until_ready(progress.state)
        finally:
            jax.profiler.stop_trace()

    with contextlib.ExitStack() as running:

        def between_steps():
            if progress.step == begin:
                jax.profiler.start_trace(folder)
                running.callback(end)
            elif progress.step == first + PROFILED[1]:
                running.close()

        yield between_steps
