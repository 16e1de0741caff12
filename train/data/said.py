"""What a run took its data for, in words: `lines(facts(dataset))`."""

from collections.abc import Mapping

from train.data.examined import CLASSES, facts

__all__ = ["facts", "line", "lines", "warnings"]

SCALE = (0.25, 4.0)  # standard deviations that train well
MANY = 1000  # kinds of tokens from which on they may be numbers
SPARSE = 16  # times that many is a vocabulary that is hardly used
PADDING = 0.25  # share of real tokens below which most is padding


def lines(found: Mapping) -> list[str]:
    """What is printed: the line, and a line for each warning."""
    return [line(found), *(f"warning: {text}" for text in warnings(found))]


def line(found: Mapping) -> str:
    """One line: sequences, lengths, channels, range, what they were taken for, loss and
    chance level."""
    splits = found["splits"]
    parts = [f"{part['sequences']:,} {split}" for split, part in splits.items()]
    length = next(iter(splits.values()))["length"]
    few, most = length["min"], length["max"]
    tokens = f"{most:,}" if few == most else f"{few:,} to {most:,}"
    if few != most:
        tokens += f" (median {length['median']:,})"
    said = [f"data: {', '.join(parts)} sequences of {tokens} tokens"]
    if found["encoder"] != "token":
        channels = found["channels"]
        said[0] += f" with {channels:,} channel{'s' * (channels != 1)}"
    said.append(found["why"] or _plainly(found))
    if found["normalised"]:
        said.append(_normalised(found["normalised"]))
    if found["loss"] in CLASSES:
        classes = f"{found['outputs']:,} classes"
        if found["largest"]:
            share = f"{found['largest']['share']:.1%}"
            classes += f", the largest ({found['largest']['class']}) {share}"
        said.append(classes)
    chance = found["chance"]
    level = f"loss {found['loss']}"
    if chance:
        metric = "accuracy" if chance["metric"] == "accuracy" else "error of the mean"
        level += f", chance level {chance['value']:.4g} ({metric}, {chance['split']})"
    said.append(level)
    if any(part["examined"] < part["sequences"] for part in splits.values()):
        most = max(part["examined"] for part in splits.values())
        said.append(f"seen in {most:,} examples of a split at most")
    return "; ".join(said)


def warnings(found: Mapping) -> list[str]:
    """What about the data may make a run worthless, each with its cure."""
    said = [*found["warnings"], *_scale_warnings(found)]
    if found["smooth"] is not None:
        said.append(
            f"the tokens look like numbers: neighbours differ {found['smooth']:.2f} "
            "times as much as any two tokens do; signals that were saved as integers "
            "are to be read with --config.data.encoder=scalar"
        )
    elif (found["distinct"] or 0) > MANY and (
        2 * found["distinct"] > found["tokens"]
        or found["vocab_size"] > SPARSE * found["distinct"]
    ):
        said.append(
            f"there are {found['distinct']:,} kinds of tokens among "
            f"{found['tokens']:,}, of a vocabulary of {found['vocab_size']:,}: what is "
            "seen so seldom is not learned; if they are numbers, they are to be read "
            "with --config.data.encoder=scalar"
        )
    for split, count in found["repeated"].items():
        total = found["splits"][split]["sequences"]
        said.append(
            f"{count:,} of the {total:,} {split} sequences are also in the training "
            "part, so that their score says little of new ones: remove the copies, or "
            "keep them in one part (an NPZ's key split)"
        )
    if count := found.get("validated", 0):  # runs of old have no such key
        total = found["splits"]["test"]["sequences"]
        said.append(
            f"{count:,} of the {total:,} test sequences are also in validation, by "
            "which the best checkpoint is chosen: remove the copies, or keep them in "
            "one part (an NPZ's key split)"
        )
    for split, names in found["unseen"].items():
        said.append(f"{split} has classes that training has not: {_few(names)}")
    for split, names in found["missing"].items():
        said.append(
            f"{split} has no sequence of {_few(names)}, which training has: its score "
            "says nothing of these classes; shuffle the rows before they are divided"
        )
    for split in found["sorted"]:
        said.append(
            f"the rows of {split} are sorted by class: what looks at the first of them "
            "only (--examples, the report) sees few classes; shuffle them"
        )
    if found["largest"] and found["largest"]["share"] == 1:
        said.append(
            f"training has one class only, {found['largest']['class']}: there is "
            "nothing to be learned"
        )
    if found["real"] < PADDING:
        cure = "cut the longest sequences, of recordings with --config.data.length"
        said.append(
            f"only {found['real']:.1%} of the tokens are real, the rest is padding: "
            f"{cure}"
        )
    return said


def _plainly(found: Mapping) -> str:
    if found["encoder"] == "token":
        return f"tokens of a vocabulary of {found['vocab_size']:,}"
    return f"{found['dtype']} in [{found['low']:.6g}, {found['high']:.6g}]"


def _normalised(scale: Mapping) -> str:
    mean, std = scale["mean"], scale["std"]
    if len(mean) == 1:
        return (
            f"normalised by the training part's mean {mean[0]:.4g} and std {std[0]:.4g}"
        )
    return (
        "normalised by the training part's mean (from "
        f"{min(mean):.4g} to {max(mean):.4g} in the channels) and std ({min(std):.4g} "
        f"to {max(std):.4g})"
    )


def _scale_warnings(found: Mapping) -> list[str]:
    said, low, high = [], *SCALE
    if found["constant"]:
        said.append(
            f"{_channels(found['constant'])} constant in the training part and nothing "
            "can be learned from it"
        )
    scale = found["scale"] or {"mean": [], "std": []}
    odd = [
        i
        for i, (mean, std) in enumerate(zip(scale["mean"], scale["std"], strict=True))
        if i not in found["constant"]
        and (not low <= std <= high or abs(mean) > high * max(std, 1))
    ]
    if odd and not found["normalised"]:
        mean, std = scale["mean"][odd[0]], scale["std"][odd[0]]
        cure = "--config.data.normalise=True takes care of it"
        cure = cure if found["why"] else "scale them where they are made"
        said.append(
            f"{_channels(odd)} far from mean 0 and std 1 (channel {odd[0]}: mean "
            f"{mean:.4g}, std {std:.4g}), from which models train badly: {cure}"
        )
    targets = found["targets"] or {"mean": [], "std": []}
    for i, (mean, std) in enumerate(zip(targets["mean"], targets["std"], strict=True)):
        if std and (not low <= std <= high or abs(mean) > high * max(std, 1)):
            said.append(
                f"the targets of output {i} have mean {mean:.4g} and std {std:.4g}, "
                "far from 0 and 1, which trains badly: regress (targets - "
                f"{mean:.4g}) / {std:.4g} instead, and undo it in the answers"
            )
            break
    return said


def _channels(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"channel {numbers[0]} is"
    return f"{len(numbers):,} channels ({_few(numbers)}) are"


def _few(names: list) -> str:
    shown = ", ".join(map(str, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"
