"""Rollouts of a video model as a section of its report."""

from collections.abc import Mapping
from pathlib import Path

from layers.models.video import Video
from train import records, runs, signals
from train.draw.markup import Section, figure, paragraph, picture, table
from train.runs import DataError, Run, Workdir
from train.video import pictures, rollout


def sections(workdir: Workdir, run: Run, reached: Mapping[str, float]) -> list[Section]:
    """Rollouts of a `Video`, whose scores stand beside those of repeating the last
    frame; none of another kind of model."""
    if not isinstance(run.model, Video):
        return []
    try:
        content = _rollouts(workdir, run)
    except DataError as error:
        content = paragraph(f"Rollouts cannot be shown: {error}.", "soft")
    return [("rollouts", "Rollouts", content)]


def _rollouts(workdir, run) -> str:
    options = {**workdir.config.rollout, "clips": rollout.SHOWN}
    split = runs.last_split(run.dataset)
    rollouts = rollout.of_run(run, options, split)
    frames, horizon = rollouts.context.shape[1], rollouts.truth.shape[1]
    note = f"Checkpoint of step {run.step:,}, {split} split. The model saw {frames} "
    note += f"frames and then its own answers for {horizon}."
    parts = [paragraph(note)]
    if rollouts.truth.ndim == 5:
        parts += _pictures(rollouts)
    if summary := (workdir.results or {}).get("rollout"):
        check(workdir.path / records.RESULTS, summary)
        parts.append(_by_horizon(summary))
    return "".join(parts)


def _pictures(rollouts) -> list[str]:
    parts, order = [], "truth above, prediction below"
    strips = signals.stoppable(pictures.strips(*rollouts.frames()))
    for number, panels in enumerate(strips, 1):
        caption = f"Clip {number}: frames that were seen, then the next ones, {order}."
        layout = dict(columns=len(panels), least=4, above=True)
        parts.append(figure(panels, caption, **layout))
    film = pictures.gif(*(frames[0] for frames in rollouts.frames()))
    caption = "The first clip: truth on the left; on the right the context, then the "
    parts.append(picture(film, caption + "model."))
    return parts


def _by_horizon(summary) -> str:
    """Scores at some horizons, of all clips that were tested at the end of the run."""
    columns, rows = rollout.by_horizon(summary)
    note = f"Means over {summary['clips']} clips of the {summary['split']} split, "
    note += f"against {summary.get('against', 'the true frames')}."
    return table(("frames ahead", *columns), rows) + paragraph(note, "soft")


def check(path: Path, summary) -> None:
    """Raises a `ValueError` that names the file unless `summary`, its key "rollout",
    is that of one."""
    scores = summary.get("scores") if isinstance(summary, dict) else None
    tables = scores.values() if isinstance(scores, dict) else [None]
    lists = [v for t in tables for v in (t.values() if isinstance(t, dict) else [None])]
    numbers = lists and all(
        isinstance(values, list)
        and len(values) == len(lists[0]) > 0
        and all(isinstance(x, int | float) for x in values)
        for values in lists
    )
    if (
        "model" not in (scores or ())
        or not numbers
        or not {"clips", "split"} <= {*summary}
    ):
        raise ValueError(
            f"{path}: rollout must have clips, split and scores, lists of numbers by "
            f"name and metric, got {summary!r:.60}"
        )
