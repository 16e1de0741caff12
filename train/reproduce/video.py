"""Layers over frames beside one another, each with the same time to train.

The first layer trains for the steps of its config. A trial tells how fast each of the
others is here, and their steps are then as many as fit into the time that the steps of
the first took; compilation, evaluation and checkpoints do not count. Rollouts are of
all clips to test, where a run itself ends in some of them.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from configs import video
from train import files, records, runs
from train.reproduce import ledger
from train.video import rollout

LAYERS = ("conv_s5", "conv_lstm")
TRIAL = 60  # steps
HORIZONS = (1, 2, 5, 10, 20, 30)


def config_of(layer: str, seed: int, steps: int = 0):
    """The config of a run; steps 0 for its own."""
    config = video.get_config(f"moving_digits,layer={layer}")
    config.seed = seed
    if steps:
        config.train.steps = steps
        config.train.eval_every = min(config.train.eval_every, steps)
        config.train.log_every = min(config.train.log_every, steps // 3)
        config.optimizer.warmup = min(abs(config.optimizer.warmup), steps // 2)
    return config


def steps_per_second(folder: Path) -> float:
    """The median over the logs of a run, the first of them left out."""
    rows = records.read_metrics(folder)
    rates = [row["steps_per_second"] for row in rows if row["split"] == "train"]
    return statistics.median(rates[1:] or rates)


def rolled(folder: Path, step: int) -> dict:
    """What `rollout.summary` says of all clips of the test split."""
    # Its layer is that of the command line.
    path, run = folder / rollout.JSON, runs.load_run(folder, trust=True)
    clips = run.dataset.num_examples("test")
    record = files.read_json(path) or {}
    if (record.get("step"), record.get("clips")) != (step, clips):
        predictions = rollout.of_run(run, {**run.config.rollout, "clips": clips})
        record = rollout.summary(run, predictions, "test")
        rollout.write(folder, predictions, record)
    return record


def play(layers: Sequence[str], seeds: Sequence[int], workdir: Path) -> dict:
    """layer -> a list over seeds of (results, folder)."""
    outcomes, seconds = {}, None
    for layer in layers:
        steps = 0
        if seconds is not None:
            trial = workdir / f"moving_digits-{layer}-trial"
            ledger.trained(config_of(layer, seeds[0], TRIAL), trial)
            steps = max(TRIAL, round(seconds * steps_per_second(trial)))
        outcomes[layer] = []
        for seed in seeds:
            folder = workdir / f"moving_digits-{layer}-{seed}"
            results = ledger.trained(config_of(layer, seed, steps), folder)
            outcomes[layer].append((results, folder))
        if seconds is None:
            seconds = statistics.median(
                results["step"] / steps_per_second(folder)
                for results, folder in outcomes[layer]
            )
    return outcomes


def table(task: str, layers: Sequence[str], seeds: Sequence[int], workdir: Path) -> str:
    """Markdown: PSNR and SSIM by horizon, the median over seeds, beside those of
    repeating the last frame."""
    outcomes = play(layers or LAYERS, seeds, workdir)
    titles = [f"PSNR +{t}" for t in HORIZONS] + [f"SSIM +{t}" for t in (10, 30)]
    titles = ["layer", "steps", *titles, "ahead from", "seconds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for layer, entries in outcomes.items():
        summaries = [rolled(folder, results["step"]) for results, folder in entries]
        all_scores = [one["scores"] for one in summaries]
        seconds = statistics.median(results["seconds"] for results, _ in entries)
        cells = [f"`{layer}`", f"{entries[0][0]['step']:,}"]
        cells += _cells([scores["model"] for scores in all_scores])
        cells += [_ahead(all_scores), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    cells = _cells([scores[rollout.COPY] for scores in all_scores])
    lines.append(f"| {rollout.COPY} | | {' | '.join(cells)} | | |")
    config, last = config_of(next(iter(outcomes)), seeds[0]), summaries[0]
    lines += [
        "",
        f"`configs/video.py:moving_digits`: {config.train.batch_size} clips of "
        f"{config.data.length} frames of {config.data.side}x{config.data.side} a step; "
        f"rollouts of {last['clips']} {last['split']} clips after "
        f"{last['context']} frames of context, PSNR in dB; medians over the seeds "
        f"{', '.join(map(str, seeds))}, last checkpoint. Ahead from: the horizon from "
        "which on PSNR is above that of repeating the last frame, with every seed. "
        "Every layer had the same time for its steps and the learning rate "
        f"{config.optimizer.lr:g}; seconds per run are with compilation and evaluation "
        f"on {ledger.machine()}.",
    ]
    return "\n".join(lines)


def _cells(scores: list[dict]) -> list[str]:
    def median(metric, t):
        return statistics.median(one[metric][t - 1] for one in scores)

    cells = [f"{median('psnr', t):.2f}" for t in HORIZONS]
    return cells + [f"{median('ssim', t):.3f}" for t in (10, 30)]


def _ahead(all_scores: list[dict]) -> str:
    """The smallest horizon from which on all seeds are better than the last frame."""
    better = [
        all(
            scores["model"]["psnr"][t] > scores[rollout.COPY]["psnr"][t]
            for scores in all_scores
        )
        for t in range(len(all_scores[0]["model"]["psnr"]))
    ]
    if not better[-1]:
        return "never"
    worse = [t for t, ahead in enumerate(better, 1) if not ahead]
    return f"+{(worse[-1] if worse else 0) + 1}"
