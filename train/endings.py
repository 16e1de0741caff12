"""What a kind of task checks before a run, makes at its end and shows in the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from layers.facts import has_state, why_no_state
from train import (
    checkpoint,
    evaluate,
    processes,
    records,
    runs,
    sharding,
    signals,
    stream,
)
from train.checkpoint import CheckpointError
from train.data.spec import Spec
from train.draw.markup import Section
from train.metrics import print_results
from train.parts import Parts, Progress
from train.report import inside
from train.runs import Run, Workdir
from train.video import rollout, section

COMPARED = 64  # rows at most that both modes read at the end of a run


class Ending(NamedTuple):
    """Of one kind of task.

    Attributes:
        check: raises a `ValueError` before training where `make` could not run after.
        make: writes its files into the workdir; what it adds to results.json.
        sections: of the report, given the scores that are reached without reading the
            inputs.
    """

    check: Callable[[ConfigDict, Spec, nn.Module], None]
    make: Callable[[Run, Path], dict]
    sections: Callable[[Workdir, Run, Mapping[str, float]], list[Section]]


def _nothing_to_check(config, spec, model) -> None:
    pass


def _nothing_more(run, workdir) -> dict:
    return {}


ANSWERS = Ending(_nothing_to_check, _nothing_more, inside.sections)
ROLLOUTS = Ending(rollout.check, rollout.predict, section.sections)

# By the loss of the data's spec.
ENDINGS = {
    "classification": ANSWERS,
    "token": ANSWERS,
    "regression": ANSWERS,
    "absolute": ANSWERS,
    "frames": ROLLOUTS,
    "codes": ROLLOUTS,
    "autoencoder": ANSWERS,
}


def measure(
    config: ConfigDict, parts: Parts, split: str, variables: dict
) -> dict[str, float] | None:
    """Means of loss and metrics over `split`; None where there is no such split.

    Raises:
        Stopped: a signal came.
    """
    if split not in parts.dataset.sources:
        return None
    return evaluate.on_split(
        parts.eval_step, variables, parts.dataset, split, config, parts.mesh
    )


def finish(config: ConfigDict, workdir: Path, parts: Parts, progress: Progress) -> dict:
    """Tests the last step and the best on validation, makes what the kind of task has
    at its end, and writes results.json. The test has chosen neither step."""

    def test(variables):
        return measure(config, parts, "test", variables)

    variables = progress.state.variables()
    kind = parts.dataset.spec.loss
    results = {
        "step": progress.step,
        "loss": kind,
        "test": test(variables),
        "best": None,
        "checkpoint": str(workdir / checkpoint.FOLDER / str(progress.step)),
    }
    if progress.best:
        number, validation = progress.best["step"], progress.best["scores"]
        results["best"] = {"step": number, "validation": validation, "test": None}
        if (best := _restored(workdir, number)) is not None:
            # Not whole on every device, where the last is not.
            best = jax.tree.map(
                lambda x, like: jax.device_put(x, like.sharding), best, variables
            )
            results["best"]["test"] = test(best)
    signals.check()
    results["parallel_vs_recurrent"] = compare(config, parts, variables)
    signals.check()
    dataset = parts.dataset
    run = Run(
        config, dataset.spec, parts.model, variables, progress.step, lambda: dataset
    )
    results |= ENDINGS[kind].make(run, workdir)
    records.write_results(workdir, results)
    print_results(results)
    return results


def _restored(workdir: Path, step: int) -> dict | None:
    """The variables of a checkpoint; None, said why, where a process cannot read it."""
    found, problem = None, None
    try:
        found, _ = checkpoint.restore_params(workdir, step)
    except CheckpointError as error:
        problem = str(error)
    problems = [*filter(None, processes.of_all(problem))]
    if problems:
        print(f"the best step is not tested: {problems[0]}")
        return None
    return found


def compare(config: ConfigDict, parts: Parts, variables: dict) -> float | str:
    """How far the recurrent mode is from the parallel one, or why there is none."""
    if not has_state(parts.model):
        return why_no_state(parts.model)
    split = runs.last_split(parts.dataset)
    count = min(COMPARED, parts.dataset.num_examples(split))
    size = sharding.evaluation_batch_size(config, parts.mesh, count)
    batch = next(iter(parts.dataset.evaluation(split, size)))
    if config.train.chunk:  # the memory is that of a piece
        batch = next(stream.pieces(batch, config.train.chunk))
    return float(evaluate.compare_modes(parts.model, variables, batch))
