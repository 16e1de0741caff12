"""Self-pretraining: a model learns its task's own inputs before the task.

"Never Train from Scratch" (https://arxiv.org/abs/2310.02980): the same model, on the
same training examples, first fills in what was hidden, or says what comes next; then it
learns the task from there. One workdir has it all: `pretrain/` is a run of its own, and
so is `scratch/`, the task without it, where `config.pretrain.scratch` asks for that.
"""

from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from train import data, loop, processes, records, resolve, settings, sharding
from train.losses import LOSSES

FOLDER, SCRATCH = "pretrain", "scratch"

HEADS = {"mean": 1, "last": 1, "retrieval": 2}  # sequences of an example of the task


def run(
    config: ConfigDict,
    workdir: str | Path,
    profile: bool = False,
    typed: Collection[str] = (),
) -> dict:
    """What `loop.run` does with `config`, after its self-pretraining, if it has any.

    Every part goes on where it was, and one that is finished is not done again.

    Returns:
        What `loop.run` returns of the task itself, or of the part that a signal ended.

    Raises:
        ValueError: a section `pretrain` that does not fit the config; what `loop.run`
            raises.
    """
    settings.check_types(config)
    if not config.get("pretrain", {}).get("steps"):
        return loop.run(config, workdir, profile, typed=typed)
    check(config)
    workdir = Path(workdir)
    first = workdir / FOLDER
    with processes.agreed():  # before the hours that come first
        check_task(fine_tuning(config, first), workdir, typed)
    print(f"self-pretraining in {first}", flush=True)
    results = loop.run(pretraining(config), first, profile, typed=typed)
    if "stopped" in results:
        return results
    if config.pretrain.scratch:
        print(f"from scratch in {workdir / SCRATCH}", flush=True)
        alone = whole(from_scratch(config))
        results = loop.run(alone, workdir / SCRATCH, typed=typed)
        if "stopped" in results:
            return results
    print(f"the task itself in {workdir}", flush=True)
    scratch = results if config.pretrain.scratch else None
    results = loop.run(fine_tuning(config, first), workdir, profile, typed=typed)
    if scratch and results.get("test") and scratch["test"]:
        kind = LOSSES[results["loss"]]
        after, before = (r["test"][kind.metric] for r in (results, scratch))
        print(
            f"test {kind.title}: {after:.4f} after self-pretraining, {before:.4f} from "
            "scratch",
            flush=True,
        )
    return results


def check(config: ConfigDict) -> None:
    """Raises a `ValueError` for a section `pretrain` that cannot be.

    What depends on the data is said when they are loaded.
    """
    options = config.pretrain
    if config.model.head not in HEADS:
        raise ValueError(
            f"pretrain.steps must be 0 unless model.head is one of {', '.join(HEADS)}, "
            f"got {options.steps} and {config.model.head!r}: it is itself what has "
            "answers at every token"
        )
    if config.model.grid:
        raise ValueError(
            f"pretrain.steps must be 0 with model.grid, got {options.steps}: it is of "
            "sequences"
        )
    if config.train.chunk:
        raise ValueError(
            f"train.chunk must be 0 with pretrain.steps, got {config.train.chunk}: the "
            f"task has a head {config.model.head!r}, which learns from whole sequences"
        )
    if config.train.init_from:
        raise ValueError(
            "train.init_from must be empty with pretrain.steps, whose weights the task "
            f"begins with, got {config.train.init_from!r}"
        )
    if options.objective not in ("masked", "next"):
        raise ValueError(
            f"pretrain.objective must be masked or next, got {options.objective!r}"
        )


def check_task(config: ConfigDict, workdir: Path, typed: Collection[str]) -> None:
    """Raises a `ValueError` for a config of the task, and for a workdir of another, as
    the run of the task itself would."""
    spec = data.load(config.data).spec
    begun_with = records.saved(workdir, "optimizer.warmup")
    config = resolve.complete(config, spec, begun_with)
    config = records.continued(workdir, config, typed)
    resolve.check(config, sharding.make_mesh(config))
    records.check_workdir(workdir, config)


def pretraining(config: ConfigDict) -> ConfigDict:
    """The config of the self-pretraining of `config`."""
    options, config = config.pretrain, from_scratch(config)
    config.data.objective = {
        "name": options.objective,
        "ratio": options.ratio,
        "levels": options.levels,
        "low": options.low,
        "high": options.high,
        "documents": HEADS[config.model.head],
    }
    config.model.update(head="token", outputs=0)
    config.optimizer.lr = options.lr or config.optimizer.lr
    often = ("eval_every", "log_every", "checkpoint_every")
    config.train.update(
        steps=options.steps,
        batch_size=options.batch_size or config.train.batch_size,
        label_smoothing=0.0,
        **{key: min(config.train[key], options.steps) for key in often},
    )
    return config


def fine_tuning(config: ConfigDict, pretrained: Path) -> ConfigDict:
    """The config of the task itself, from what was `pretrained`."""
    config = whole(config.copy_and_resolve_references())
    if config.pretrain.objective == "masked":
        config.data.objective = {"name": "marked"}
    config.train.init_from = str(pretrained)
    return config


def whole(config: ConfigDict) -> ConfigDict:
    """`config`, changed: the task has a target for a whole example, which
    `data.buckets.cut` cuts for the self-pretraining alone; and no buckets where their
    lengths are halves of another than an example's."""
    if (buckets := config.data.get("buckets")) and buckets.get("cut"):
        shortest = 0 if buckets.get("longest") else buckets.shortest
        buckets.update(cut=False, longest=0, shortest=shortest)
    return config


def from_scratch(config: ConfigDict) -> ConfigDict:
    """The config of the task alone: a copy that asks for no self-pretraining."""
    config = config.copy_and_resolve_references()
    config.pretrain.update(steps=0, scratch=False)
    return config
