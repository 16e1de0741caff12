"""One run: set up, restore, train, evaluate."""

import contextlib
import math
import os
from collections.abc import Collection
from pathlib import Path

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from layers.models.build import build
from train import (
    checkpoint,
    data,
    faults,
    processes,
    records,
    replay,
    resolve,
    settings,
    sharding,
    step,
)
from train.checkpoint import Checkpoints
from train.endings import ENDINGS, finish, measure
from train.faults import asking, look_ahead, noted, until_stopped
from train.losses import LOSSES
from train.metrics import Metrics, profiler
from train.pace import Pace
from train.parts import set_up, start
from train.signals import Stopped, stop_signals
from train.window import check_window, log


def run(
    config: ConfigDict,
    workdir: str | Path,
    profile: bool = False,
    model: nn.Module | None = None,
    typed: Collection[str] = (),
) -> dict:
    """Trains what `config` says in `workdir`, or goes on with what was begun there.

    Args:
        config: `configs.common.base()` with a task's changes.
        workdir: gets config.json, versions.json, metrics.jsonl, tensorboard/,
            checkpoints/ and, at the end, results.json.
        profile: also writes a trace of five steps, or of as many as there are, to
            workdir/profile.
        model: instead of `build(config.model)`.
        typed: keys of the config that somebody set: what began before one of today's
            defaults goes on with its own, but not where that default was asked for.

    Returns:
        What results.json holds; {"step", "stopped"} if a signal ended the run early.

    Raises:
        ValueError: an invalid setting, or a workdir that is of another config,
            in use by another run, or not to be written.
        CheckpointError: a checkpoint cannot be written or read, or the disk is full.
        FloatingPointError: loss, gradient or state are not finite.
        BatchError: examples cannot be read any more, or a process that prepares them
            has died; the last step that was done is saved.
        LostError: another process of the run is lost.
    """
    settings.check_types(config)
    workdir = Path(workdir).absolute()
    with stop_signals() as stop, faults.of_others(workdir):
        stop.nothing_to_save("setting up")
        return _run(config, workdir, profile, model, typed, stop)


def _run(config, workdir, profile, model, typed, stop) -> dict:
    with processes.agreed():
        dataset = data.load(config.data)
        begun_with = records.saved(workdir, "optimizer.warmup")
        config = resolve.complete(config, dataset.spec, begun_with)
        config = records.continued(workdir, config, typed)
        mesh = sharding.make_mesh(config)
        resolve.check(config, mesh)
        model = build(config.model) if model is None else model
        if dataset.spec.causal:
            resolve.check_causal(model)
        ENDINGS[dataset.spec.loss].check(config, dataset.spec, model)
    if jax.process_count() > 1:
        processes.check_same("config", records.values(config))
        processes.check_same("code", records.code())
    # A finished run is told of also where nothing can be written.
    if not processes.from_the_first(os.access(workdir, os.W_OK)) and (
        results := finished(workdir, config)
    ):
        return results
    with processes.held(workdir) as lock:
        return finished(workdir, config) or go_on(
            config, workdir, dataset, mesh, model, profile, stop, lock
        )


def finished(workdir: Path, config: ConfigDict) -> dict | None:
    """What `records.finished` tells process 0."""
    with processes.agreed():
        first = jax.process_index() == 0
        results = records.finished(workdir, config) if first else None
    return processes.from_the_first(results)


def go_on(config, workdir, dataset, mesh, model, profile, stop, lock) -> dict:
    """What `run` does in a workdir that is its own and not finished."""
    options, several = config.train, jax.process_count() > 1
    try:
        with (
            faults.of_files(workdir),
            Checkpoints(
                workdir, options.keep, lock.check, options.save_timeout
            ) as checkpoints,
        ):
            with processes.agreed():
                records.check_writable(workdir)
                records.check_data(workdir, dataset)
            parts = set_up(config, dataset, mesh, model, stop)
            with faults.leaving(lock):
                # Only now: what cannot be set up leaves nothing behind.
                records.write_config(workdir, config)
                records.write_data(workdir, dataset, parts.facts)
                records.write_versions(workdir)
                progress = start(config, workdir, parts, checkpoints)
                stopped = train(
                    config, workdir, parts, progress, checkpoints, stop, profile
                )
    except FloatingPointError as error:
        if checkpoint.hanging():  # whoever looked for a checkpoint would hang too
            raise
        stop.ends_after("step of the search for what broke")
        good = checkpoint.last_good(workdir)  # known only now: saves have ended
        broken = replay.first_broken(config, workdir, parts, progress.step)
        raise FloatingPointError(
            f"{error}; {broken}last good checkpoint: {good} in {workdir}. A lower "
            "optimizer.lr, a longer warmup or a smaller clip may help"
        ) from error
    if not stopped:
        stop.ends_after("last evaluation" if several else "batch")
        with contextlib.suppress(Stopped):
            return finish(config, workdir, parts, progress)
    print(
        f"stopped by {stop.signal} at step {progress.step}; to go on from there, "
        f"start the same command again (workdir {workdir})",
        flush=True,
    )
    return {"step": progress.step, "stopped": stop.signal}


def train(config, workdir, parts, progress, checkpoints, stop, profile) -> bool:
    """Advances `progress` to the last step, or until a signal stops it; whether one
    did, in any process.

    What the steps measured stays on the device, in `progress.unchecked`, until it is
    logged or a checkpoint is due. A validation that a signal or missing data cut off
    is made at the next start, before any step.
    """
    options, saved, missed = config.train, progress.step, []
    pace = Pace(parts.mesh)
    metrics = Metrics(workdir, progress.step, options.steps, progress.unvalidated)
    trace = profiler(workdir / "profile", progress, options.steps)
    with metrics, contextlib.closing(parts.batches), trace as between_steps:
        with processes.agreed():
            look_ahead(parts.batches, options.steps - progress.step)
        with until_stopped(missed):
            if progress.unvalidated:
                with metrics.paused():
                    validate(config, parts, progress, metrics)
            while progress.step < options.steps:
                if profile:
                    between_steps()
                pace.wait()
                metrics.advance(progress.step - len(pace))
                with asking():
                    if not may_begin(progress.step + 1, pace, parts.batches, stop):
                        break
                    batch = next(parts.batches)
                batch = sharding.place(batch, parts.mesh)
                with jax.transfer_guard("disallow"):
                    progress.state, measures = parts.train_step(progress.state, batch)
                progress.step += 1
                progress.unchecked.append(measures)
                with noted(missed):
                    look_ahead(parts.batches, options.steps - progress.step)
                pace.begun(measures["loss"], bool(stop.signal or missed))
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
                        save(config, parts, progress, checkpoints)
                    saved = progress.step
        pace.drain()
        metrics.advance(progress.step)
        if progress.step > saved:  # a signal came, or no more data did
            save(config, parts, progress, checkpoints)
        # None ends, or says that a step is saved, before process 0 has found it whole.
        checkpoints.wait()
        with processes.agreed():
            if missed:
                raise missed[0].saved(progress.step, workdir) from missed[0].__cause__
        return any(processes.of_all(stop.signal is not None))


def may_begin(step: int, pace: Pace, batches, stop) -> bool:
    """Whether `step` is to be computed: with its batch there, and no signal."""
    if jax.process_count() > 1:
        return pace.goes_on(stop)
    return batches.ready(lambda: stop.signal) and stop.may_begin(step)


def validate(config, parts, progress, metrics) -> bool:
    """Whether this step is the best on the validation split so far."""
    with asking():
        scores = measure(config, parts, "validation", progress.state.variables())
    progress.unvalidated = False
    if scores is None:
        return False
    if not math.isfinite(scores["loss"]):
        raise FloatingPointError(
            f"the validation loss is {scores['loss']} at step {progress.step}"
        )
    metrics.write(progress.step, "validation", scores)
    loss = LOSSES[parts.dataset.spec.loss]
    if progress.best and not loss.better(scores, progress.best["scores"]):
        return False
    progress.best = {"step": progress.step, "scores": scores}
    return True


def save(config, parts, progress, checkpoints) -> None:
    """Starts a checkpoint of a state that is known to be finite."""
    check_window(progress, config.train.skip_nonfinite)
    if not step.all_finite(progress.state):
        raise FloatingPointError(f"the state is not finite at step {progress.step}")
    best = progress.best and progress.best["step"]
    checkpoints.save(progress.state, parts.batches.get_state(), progress.memory(), best)
