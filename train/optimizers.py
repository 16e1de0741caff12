"""AdamW with parameter groups chosen by path, a schedule and global-norm clipping."""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from layers.parameters import Alike

SCHEDULES = ("cosine", "constant", "inverse_sqrt")
OPTIONS = ("lr", "wd", "optional")

Schedule = Callable[[int], jax.Array]


def make(
    config: Mapping, params
) -> tuple[optax.GradientTransformation, dict[str, list[str]], Schedule]:
    """The optimizer of a run.

    The gradient of all groups together is clipped to the norm `optimizer.clip` (0: not
    at all); then each group takes its AdamW step with learning rate `group.lr *
    schedule(step)` and decay `group.wd * optimizer.weight_decay`.

    `config.groups` lists (pattern, {"lr": factor, "wd": factor, "optional": bool}), the
    factors 1.0 and optional False where left out. A parameter belongs to the first
    pattern that matches the whole of its path, such as "stack/block_0/mixer/Lambda_re",
    or what that path would be under the name that its layer declares it to learn like
    (`layers.parameters.Alike`). lr 0 freezes a group. Every parameter must belong to a
    group, and every group must have a parameter unless it is optional, so that a
    misspelt name cannot pass unseen; one list serves all layers by marking optional the
    groups that only some of them have.

    Args:
        config: the run's, of which "optimizer", "groups" and "train"["steps"] are read.
        params: tree of parameters, or of their shapes; in their boxes where layers
            declare what they learn like.

    Returns:
        tx, {pattern: [path, ...]} in the order of `config.groups`, and the schedule of
        the learning rate before the groups' factors.

    Raises:
        ValueError: a parameter without a group, a group without a parameter, or an
            unknown or impossible setting.
    """
    optimizer = config["optimizer"]
    for key in ("weight_decay", "clip"):
        if optimizer[key] < 0:
            raise ValueError(f"optimizer.{key} must be 0 or more, got {optimizer[key]}")
    for key in ("b1", "b2"):
        if not 0 <= optimizer[key] < 1:
            raise ValueError(
                f"optimizer.{key} must lie in [0, 1), got {optimizer[key]}"
            )
    if not optimizer["eps"] > 0:
        raise ValueError(f"optimizer.eps must be above 0, got {optimizer['eps']}")
    steps = config["train"]["steps"]
    warmup = warmup_steps(optimizer["warmup"], steps)
    schedule = make_schedule({**optimizer, "warmup": warmup}, steps)
    options = [
        (pattern, _options(pattern, fields)) for pattern, fields in config["groups"]
    ]
    labels, groups = _assign(options, params)
    transforms = {
        pattern: _adamw(optimizer, schedule, factors)
        for pattern, factors in options
        if groups[pattern]
    }
    tx = optax.partition(transforms, labels)
    if optimizer["clip"]:
        # Before the partition: inside it, every group would see only its own norm.
        tx = optax.chain(optax.clip_by_global_norm(optimizer["clip"]), tx)
    return tx, groups, schedule


def make_schedule(optimizer: Mapping, steps: int) -> Schedule:
    """Learning rate over steps: linear warmup from 0, then `optimizer.schedule`.

    "cosine" falls to `floor * lr` at `steps`; "constant" stays at `lr`; "inverse_sqrt"
    is lr * sqrt(warmup / step).

    Raises:
        ValueError: an unknown schedule, warmup outside [0, steps), a negative lr, a
            floor outside [0, 1].
    """
    name, peak = optimizer["schedule"], optimizer["lr"]
    warmup, floor = optimizer["warmup"], optimizer["floor"]
    if name not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {name!r}"
        )
    if not 0 <= warmup < steps:
        raise ValueError(
            f"optimizer.warmup must be 0 or more and below train.steps = {steps}, "
            f"got {warmup}; a shorter run takes --config.optimizer.warmup too"
        )
    if peak < 0:
        raise ValueError(f"optimizer.lr must be 0 or more, got {peak}")
    if not 0 <= floor <= 1:
        raise ValueError(
            f"optimizer.floor must be a share of lr in [0, 1], got {floor}"
        )
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, alpha=floor)
    elif name == "constant":
        after = optax.constant_schedule(peak)
    else:
        start = max(warmup, 1)

        def after(step):
            # join_schedules also evaluates what it does not choose: steps below 0.
            return peak * (start / (start + jnp.maximum(step, 0))) ** 0.5

    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0, peak, warmup), after], [warmup]
    )


def warmup_steps(warmup: int, steps: int) -> int:
    """Steps of the warmup that `optimizer.warmup` says in a run of `steps`.

    A recipe's is written as its negative: -500 are 500 steps, or a tenth of the run
    where that is no longer than the warmup. Any other number is the user's and stays.
    """
    if warmup >= 0:
        return warmup
    return -warmup if -warmup < steps else max(steps, 0) // 10


def settle_warmup(config: Mapping, saved: int | None = None) -> None:
    """Sets `optimizer.warmup` to its `warmup_steps`, and says so if they are fewer.

    Args:
        config: a run's, which is changed.
        saved: the warmup that the run began with, which a recipe's does not change
            however many steps it is now to have; None in a new run.
    """
    optimizer, steps = config["optimizer"], config["train"]["steps"]
    recipe = -optimizer["warmup"]
    if recipe <= 0:
        return
    warmup = warmup_steps(-recipe, steps) if saved is None else saved
    optimizer["warmup"] = warmup
    if saved is None and warmup != recipe:
        print(
            f"warmup: {warmup} steps, a tenth of train.steps = {steps}; "
            f"the recipe has {recipe}",
            flush=True,
        )


def _options(pattern: str, factors: Mapping) -> dict:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"groups: {pattern!r} must be a regular expression ({error})"
        ) from None
    unknown = sorted(set(factors) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"group {pattern!r}: {', '.join(unknown)} must be one of "
            f"{', '.join(OPTIONS)}"
        )
    options = {"lr": 1.0, "wd": 1.0, "optional": False, **factors}
    for name in ("lr", "wd"):
        if options[name] < 0:
            raise ValueError(
                f"group {pattern!r}: {name} must be a factor of 0 or more, "
                f"got {options[name]}"
            )
    return options


def _assign(options, params):
    """The tree of each parameter's pattern, and the paths by pattern."""
    groups = {pattern: [] for pattern, _ in options}
    unmatched = []

    def assign(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names = [name]
        if isinstance(leaf, Alike):
            names += ["/".join([*name.split("/")[:-1], leaf.like])]
        for pattern in groups:
            if any(re.fullmatch(pattern, name) for name in names):
                groups[pattern].append(name)
                return pattern
        unmatched.append(name)
        return ""

    # A parameter with logical axis names is boxed; one label then stands for the box,
    # so that the labels fit the tree with and without boxes.
    labels = jax.tree.map_with_path(
        assign, params, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)
    )
    patterns = ", ".join(map(repr, groups))
    if unmatched:
        raise ValueError(
            f"parameters without a group: {', '.join(unmatched)}; the patterns of "
            f"groups are {patterns}"
        )
    for pattern, factors in options:
        if not groups[pattern] and not factors["optional"]:
            raise ValueError(
                f"group {pattern!r} has no parameter that an earlier one left; "
                "correct it or mark it optional=True"
            )
    return labels, groups


def _adamw(optimizer: Mapping, schedule: Schedule, factors: Mapping):
    if not factors["lr"]:
        return optax.set_to_zero()
    return optax.adamw(
        lambda step: factors["lr"] * schedule(step),
        b1=optimizer["b1"],
        b2=optimizer["b2"],
        eps=optimizer["eps"],
        weight_decay=factors["wd"] * optimizer["weight_decay"],
    )
