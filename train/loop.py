"""One run: set up, restore, train, evaluate."""

import contextlib
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from layers.models.build import build
from train import (
    checkpoint,
    data,
    files,
    flight,
    losses,
    processes,
    records,
    replay,
    resolve,
    settings,
    sharding,
    step,
)
from train.checkpoint import CheckpointError, Checkpoints
from train.data.workers import WorkerError
from train.endings import ENDINGS, finish, measure
from train.losses import LOSSES
from train.metrics import Metrics, profiler
from train.pace import Pace
from train.parts import set_up, start
from train.signals import Stopped, stop_signals


class BatchError(RuntimeError):
    """Examples could not be had while a run went on. Its cause says why; the message
    also says what is saved."""


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
    """
    settings.check_types(config)
    with stop_signals() as stop:
        stop.nothing_to_save("setting up")
        return _run(config, Path(workdir).absolute(), profile, model, typed, stop)


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
    if not os.access(workdir, os.W_OK) and (
        finished := records.finished(workdir, config)
    ):
        return finished
    with processes.held(workdir) as lock:
        return records.finished(workdir, config) or go_on(
            config, workdir, dataset, mesh, model, profile, stop, lock
        )


def go_on(config, workdir, dataset, mesh, model, profile, stop, lock) -> dict:
    """What `run` does in a workdir that is its own and not finished."""
    try:
        options = config.train
        with Checkpoints(
            workdir, options.keep, lock.check, options.save_timeout
        ) as checkpoints:
            with processes.agreed():
                records.check_writable(workdir)
                records.check_data(workdir, dataset)
                parts = set_up(config, dataset, mesh, model, stop)
            # Only now: what cannot be set up leaves nothing behind.
            records.write_config(workdir, config)
            records.write_data(workdir, dataset, parts.facts)
            records.write_versions(workdir)
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
        if checkpoint.hanging():  # whoever looked for a checkpoint would hang too
            raise
        stop.ends_after("step of the search for what broke")
        good = checkpoint.last_good(workdir)  # known only now: saves have ended
        broken = replay.first_broken(config, workdir, parts, progress.step)
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


def train(config, workdir, parts, progress, checkpoints, stop, profile) -> None:
    """Advances `progress` to the last step, or until a signal stops it.

    What the steps measured stays on the device, in `progress.unchecked`, until it is
    logged or a checkpoint is due. A validation that a signal or missing data cut off
    is made at the next start, before any step.
    """
    options, saved, faults = config.train, progress.step, []
    pace = Pace(parts.mesh)
    metrics = Metrics(workdir, progress.step, options.steps, progress.unvalidated)
    trace = profiler(workdir / "profile", progress, options.steps)
    with metrics, contextlib.closing(parts.batches), trace as between_steps:
        with processes.agreed():
            look_ahead(parts.batches, options.steps - progress.step)
        with until_stopped(faults):
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
                with noted(faults):
                    look_ahead(parts.batches, options.steps - progress.step)
                pace.begun(measures["loss"], bool(stop.signal or faults))
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
        with processes.agreed():
            if faults:
                fault, *_ = faults
                checkpoints.wait()  # before it is said that the step is saved
                step = progress.step
                done = f"step {step} is saved" if step else "no step done"
                raise BatchError(
                    f"{fault}; {done}, from where the same command goes on (workdir "
                    f"{workdir})"
                ) from fault.__cause__


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turns any error of what makes examples, a user's own code as well, into a
    `BatchError`."""
    try:
        yield
    except (Stopped, jax.errors.JaxRuntimeError):  # that is the device's
        raise
    except Exception as error:
        plain = isinstance(error, (OSError, ValueError, WorkerError))
        kind = "" if plain else f"{type(error).__name__}: "
        raise BatchError(f"{kind}{error}") from error


@contextlib.contextmanager
def until_stopped(faults: list[BatchError]) -> Iterator[None]:
    """Ends the block at a signal, and at a `BatchError`, which is added to `faults`.

    Several processes save together: what one of them alone meets here, such as in a
    validation, is raised at once.
    """
    try:
        with noted(faults if jax.process_count() == 1 else None):
            yield
    except Stopped:
        pass


@contextlib.contextmanager
def noted(faults: list[BatchError] | None) -> Iterator[None]:
    """Ends the block at a `BatchError`, which is added to `faults`; None raises it."""
    try:
        yield
    except BatchError as error:
        if faults is None:
            raise
        faults.append(error)


def look_ahead(batches, left: int) -> None:
    """Where there are several processes, prepares what this one needs for the steps
    that all may have begun before it can tell the others of a `BatchError`.

    Args:
        batches: of this process.
        left: steps that are still to be made.
    """
    if jax.process_count() > 1:
        with asking():
            batches.look_ahead(min(left, Pace.AHEAD))


def may_begin(step: int, pace: Pace, batches, stop) -> bool:
    """Whether `step` is to be computed: with its batch there, and no signal."""
    if jax.process_count() > 1:
        return pace.goes_on(stop)
    return batches.ready(lambda: stop.signal) and stop.may_begin(step)


def log(config, parts, progress, metrics, batch) -> None:
    """Writes the means over the steps since the last log, and of its last batch what
    the recorder shows. Steps that were skipped have no part in either."""
    allowed = config.train.skip_nonfinite
    check_window(progress, allowed)
    names = [name for name in (progress.window or [{}])[0] if name != "weight"]
    means = {k: float(np.mean([m[k] for m in progress.window])) for k in names}
    # The schedule counts updates.
    means["lr"] = float(parts.schedule(max(progress.step - progress.skipped - 1, 0)))
    if allowed:
        means["skipped"] = progress.skipped
    means["steps_per_second"] = metrics.rate(progress.step)
    if config.train.record and not progress.in_a_row:
        quantities = flight.quantities(parts.probe(progress.state, batch).record)
        means |= {f"record/{name}": value for name, value in quantities.items()}
    metrics.write(progress.step, "train", means)
    progress.window = []


def check_window(progress, allowed: int = 0) -> None:
    """Fetches what was measured and not yet checked, and moves it to the window.

    Args:
        progress: of the run; counts the steps that were skipped.
        allowed: `train.skip_nonfinite`.

    Raises:
        FloatingPointError: something is not finite, where steps are skipped in more
            than `allowed` steps in a row or in one that was not skipped.
        ValueError: a batch had nothing to learn from.
    """
    fetched, progress.unchecked = jax.device_get(progress.unchecked), []
    for number, measures in enumerate(fetched, progress.step - len(fetched) + 1):
        measures = {name: float(value) for name, value in measures.items()}
        bad = {k: v for k, v in measures.items() if not math.isfinite(v)}
        if allowed and any(name in bad for name in step.DECISIVE):
            skip(progress, number, bad, allowed)
            continue
        for name, value in bad.items():
            raise FloatingPointError(f"{name} is {value} at step {number}")
        if measures["weight"] == 0:
            raise ValueError(
                f"the batch of step {number} must have a target to learn from, got "
                f"only masked ones or {losses.IGNORED}, which is ignored"
            )
        progress.in_a_row = 0
        progress.window.append(measures)


def skip(progress, number: int, bad: dict, allowed: int) -> None:
    """Counts a step that changed nothing, and says so.

    Args:
        progress, allowed: see `check_window`.
        number: of the step.
        bad: name -> value of what is not finite.

    Raises:
        FloatingPointError: too many in a row.
    """
    progress.skipped += 1
    progress.in_a_row += 1
    what = ", ".join(f"{name} is {value}" for name, value in bad.items())
    if progress.in_a_row > allowed:
        first = number - progress.in_a_row + 1
        raise FloatingPointError(
            f"{what} at step {number}, the last of {progress.in_a_row} steps in a row, "
            f"from step {first} on, that are not finite, and train.skip_nonfinite "
            f"allows {allowed}"
        )
    if jax.process_index() == 0:
        print(f"step {number} is skipped: {what}", flush=True)


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
