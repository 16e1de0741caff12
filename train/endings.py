"""How good a run is: its scores on a split, and the answers at its end."""

import jax

from layers.models.video import Video
from train import checkpoint, evaluate, metrics, runs, sharding, signals, step
from train.checkpoint import CheckpointError
from train.video import rollout

COMPARED = 64  # rows at most that both modes read at the end of a run


def measure(config, parts, split: str, variables) -> dict[str, float] | None:
    """Means of loss and metrics over `split`; None where there is no such split.

    Raises:
        Stopped: a signal came.
    """
    if split not in parts.dataset.sources:
        return None
    size = sharding.evaluation_batch_size(
        config, parts.mesh, parts.dataset.num_examples(split)
    )
    batches = signals.stoppable(parts.dataset.evaluation(split, size))
    return step.evaluate(parts.eval_step, variables, batches, parts.mesh)


def finish(config, workdir, parts, progress) -> dict:
    """Tests the last step and the best on validation; the test has chosen neither."""

    def test(variables):
        return measure(config, parts, "test", variables)

    variables = progress.state.variables()
    results = {
        "step": progress.step,
        "loss": parts.dataset.spec["loss"],
        "test": test(variables),
        "best": None,
        "checkpoint": str(workdir / checkpoint.FOLDER / str(progress.step)),
    }
    if progress.best:
        number, validation = progress.best["step"], progress.best["scores"]
        results["best"] = {"step": number, "validation": validation, "test": None}
        try:
            best, _ = checkpoint.restore_params(workdir, number)
            best = jax.device_put(best, sharding.replicated(parts.mesh))
            results["best"]["test"] = test(best)
        except CheckpointError as error:
            print(f"the best step is not tested: {error}")
    signals.check()
    results["parallel_vs_recurrent"] = compare(config, parts, variables)
    signals.check()
    if isinstance(parts.model, Video):
        run = runs.Run(config, parts.dataset, parts.model, variables, progress.step)
        results["rollout"] = predict(run, workdir)
    runs.write_results(workdir, results)
    metrics.print_results(results)
    return results


def predict(run: runs.Run, workdir) -> dict:
    """Open-loop rollouts of the test split (or the last there is), their scores and
    their files in `workdir`."""
    split = runs.last_split(run.dataset)
    found = rollout.of_run(run, run.config.rollout, split)
    summary = rollout.summary(run, found, split)
    if jax.process_index() == 0:
        rollout.write(workdir, found, summary)
        rollout.show(summary)
    return summary


def compare(config, parts, variables) -> float | str:
    """How far the recurrent mode is from the parallel one, or why there is none."""
    try:
        parts.model.init_state(1)
    except ValueError as error:
        return str(error)
    split = runs.last_split(parts.dataset)
    count = min(COMPARED, parts.dataset.num_examples(split))
    size = sharding.evaluation_batch_size(config, parts.mesh, count)
    batch = next(iter(parts.dataset.evaluation(split, size)))
    return float(evaluate.compare_modes(parts.model, variables, batch))
