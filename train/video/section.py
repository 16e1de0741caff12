"""Rollouts of a video model as a section of its report."""

from collections.abc import Mapping
from pathlib import Path

from layers.models.video import Video
from train import records, runs, signals
from train.draw.markup import Section, figure, paragraph, picture, table
from train.runs import DataError, Run, Workdir
from train.video import pictures, rollout


def sections(told: Workdir, run: Run, reached: Mapping[str, float]) -> list[Section]:
    """Rollouts of a `Video`, whose scores stand beside those of repeating the last
    frame; none of another kind of model."""
    if not isinstance(run.model, Video):
        return []
    try:
        found = _rollouts(told, run)
    except DataError as error:
        found = paragraph(f"Rollouts cannot be shown: {error}.", "soft")
    return [("rollouts", "Rollouts", found)]


def _rollouts(told, run) -> str:
    options = {**told.config.rollout, "clips": rollout.SHOWN}
    split = runs.last_split(run.dataset)
    found = rollout.of_run(run, options, split)
    seen, ahead = found.context.shape[1], found.truth.shape[1]
    said = f"Checkpoint of step {run.step:,}, {split} split. The model saw {seen} "
    said += f"frames and then its own answers for {ahead}."
    parts = [paragraph(said)]
    if found.truth.ndim == 5:
        parts += _pictures(found)
    if scored := (told.results or {}).get("rollout"):
        check(told.path / records.RESULTS, scored)
        parts.append(_by_horizon(scored))
    return "".join(parts)


def _pictures(found) -> list[str]:
    parts, rest = [], "truth above, prediction below"
    strips = signals.stoppable(pictures.strips(*found.frames()))
    for number, panels in enumerate(strips, 1):
        caption = f"Clip {number}: frames that were seen, then the next ones, {rest}."
        look = dict(columns=len(panels), least=4, above=True)
        parts.append(figure(panels, caption, **look))
    film = pictures.gif(*(frames[0] for frames in found.frames()))
    caption = "The first clip: truth on the left; on the right the context, then the "
    parts.append(picture(film, caption + "model."))
    return parts


def _by_horizon(scored) -> str:
    """Scores at some horizons, of all clips that were tested at the end of the run."""
    columns, rows = rollout.by_horizon(scored)
    said = f"Means over {scored['clips']} clips of the {scored['split']} split, "
    said += f"against {scored.get('against', 'the true frames')}."
    return table(("frames ahead", *columns), rows) + paragraph(said, "soft")


def check(path: Path, found) -> None:
    """Raises a `ValueError` that names the file unless `found`, its key "rollout", is
    the summary of one."""
    scores = found.get("scores") if isinstance(found, dict) else None
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
        or not {"clips", "split"} <= {*found}
    ):
        raise ValueError(
            f"{path}: rollout must have clips, split and scores, lists of numbers by "
            f"name and metric, got {found!r:.60}"
        )
