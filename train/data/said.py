"""What a run took its data for, in words: `lines(facts(dataset))`."""

from collections.abc import Mapping

from train.data.examined import CLASSES, facts

__all__ = ["facts", "line", "lines", "warnings"]

SCALE = (0.25, 4.0)  # standard deviations that train well
MANY = 1000  # kinds of tokens from which on they may be numbers
SPARSE = 16  # times that many is a vocabulary that is hardly used
PADDING = 0.25  # share of real tokens below which most is padding


def lines(facts: Mapping) -> list[str]:
    """What is printed: the line, and a line for each warning."""
    return [line(facts), *(f"warning: {text}" for text in warnings(facts))]


def line(facts: Mapping) -> str:
    """One line: sequences, lengths, channels, range, what they were taken for, loss and
    chance level."""
    splits = facts["splits"]
    parts = [f"{part['sequences']:,} {split}" for split, part in splits.items()]
    length = next(iter(splits.values()))["length"]
    few, most = length["min"], length["max"]
    tokens = f"{most:,}" if few == most else f"{few:,} to {most:,}"
    if few != most:
        tokens += f" (median {length['median']:,})"
    clauses = [f"data: {', '.join(parts)} sequences of {tokens} tokens"]
    if facts["encoder"] != "token":
        channels = facts["channels"]
        clauses[0] += f" with {channels:,} channel{'s' * (channels != 1)}"
    clauses.append(facts["why"] or _plainly(facts))
    if facts["normalised"]:
        clauses.append(_normalised(facts["normalised"]))
    if facts["loss"] in CLASSES:
        classes = f"{facts['outputs']:,} classes"
        if facts["largest"]:
            share = f"{facts['largest']['share']:.1%}"
            classes += f", the largest ({facts['largest']['class']}) {share}"
        clauses.append(classes)
    chance = facts["chance"]
    level = f"loss {facts['loss']}"
    if chance:
        metric = "accuracy" if chance["metric"] == "accuracy" else "error of the mean"
        level += f", chance level {chance['value']:.4g} ({metric}, {chance['split']})"
    clauses.append(level)
    if any(part["examined"] < part["sequences"] for part in splits.values()):
        most = max(part["examined"] for part in splits.values())
        clauses.append(f"seen in {most:,} examples of a split at most")
    return "; ".join(clauses)


def warnings(facts: Mapping) -> list[str]:
    """What about the data may make a run worthless, each with its cure."""
    sentences = [*facts["warnings"], *_scale_warnings(facts)]
    if facts["smooth"] is not None:
        sentences.append(
            f"the tokens look like numbers: neighbours differ {facts['smooth']:.2f} "
            "times as much as any two tokens do; signals that were saved as integers "
            "are to be read with --config.data.encoder=scalar"
        )
    elif (facts["distinct"] or 0) > MANY and (
        2 * facts["distinct"] > facts["tokens"]
        or facts["vocab_size"] > SPARSE * facts["distinct"]
    ):
        sentences.append(
            f"there are {facts['distinct']:,} kinds of tokens among "
            f"{facts['tokens']:,}, of a vocabulary of {facts['vocab_size']:,}: what is "
            "seen so seldom is not learned; if they are numbers, they are to be read "
            "with --config.data.encoder=scalar"
        )
    for split, count in facts["repeated"].items():
        total = facts["splits"][split]["sequences"]
        sentences.append(
            f"{count:,} of the {total:,} {split} sequences are also in the training "
            "part, so that their score says little of new ones: remove the copies, or "
            "keep them in one part (an NPZ's key split)"
        )
    if count := facts.get("validated", 0):  # runs of old have no such key
        total = facts["splits"]["test"]["sequences"]
        sentences.append(
            f"{count:,} of the {total:,} test sequences are also in validation, by "
            "which the best checkpoint is chosen: remove the copies, or keep them in "
            "one part (an NPZ's key split)"
        )
    for split, names in facts["unseen"].items():
        sentences.append(f"{split} has classes that training has not: {_few(names)}")
    for split, names in facts["missing"].items():
        sentences.append(
            f"{split} has no sequence of {_few(names)}, which training has: its score "
            "says nothing of these classes; shuffle the rows before they are divided"
        )
    for split in facts["sorted"]:
        sentences.append(
            f"the rows of {split} are sorted by class: what looks at the first of them "
            "only (--examples, the report) sees few classes; shuffle them"
        )
    if facts["largest"] and facts["largest"]["share"] == 1:
        sentences.append(
            f"training has one class only, {facts['largest']['class']}: there is "
            "nothing to be learned"
        )
    if facts["real"] < PADDING:
        cure = "cut the longest sequences, of recordings with --config.data.length"
        sentences.append(
            f"only {facts['real']:.1%} of the tokens are real, the rest is padding: "
            f"{cure}"
        )
    return sentences


def _plainly(facts: Mapping) -> str:
    if facts["encoder"] == "token":
        return f"tokens of a vocabulary of {facts['vocab_size']:,}"
    return f"{facts['dtype']} in [{facts['low']:.6g}, {facts['high']:.6g}]"


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


def _scale_warnings(facts: Mapping) -> list[str]:
    sentences, low, high = [], *SCALE
    if facts["constant"]:
        sentences.append(
            f"{_channels(facts['constant'])} constant in the training part and nothing "
            "can be learned from it"
        )
    scale = facts["scale"] or {"mean": [], "std": []}
    odd = [
        i
        for i, (mean, std) in enumerate(zip(scale["mean"], scale["std"], strict=True))
        if i not in facts["constant"]
        and (not low <= std <= high or abs(mean) > high * max(std, 1))
    ]
    if odd and not facts["normalised"]:
        mean, std = scale["mean"][odd[0]], scale["std"][odd[0]]
        cure = "--config.data.normalise=True takes care of it"
        cure = cure if facts["why"] else "scale them where they are made"
        sentences.append(
            f"{_channels(odd)} far from mean 0 and std 1 (channel {odd[0]}: mean "
            f"{mean:.4g}, std {std:.4g}), from which models train badly: {cure}"
        )
    targets = facts["targets"] or {"mean": [], "std": []}
    for i, (mean, std) in enumerate(zip(targets["mean"], targets["std"], strict=True)):
        if std and (not low <= std <= high or abs(mean) > high * max(std, 1)):
            sentences.append(
                f"the targets of output {i} have mean {mean:.4g} and std {std:.4g}, "
                "far from 0 and 1, which trains badly: regress (targets - "
                f"{mean:.4g}) / {std:.4g} instead, and undo it in the answers"
            )
            break
    return sentences


def _channels(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"channel {numbers[0]} is"
    return f"{len(numbers):,} channels ({_few(numbers)}) are"


def _few(names: list) -> str:
    text = ", ".join(map(str, names[:5]))
    return text if len(names) <= 5 else f"{text} and {len(names) - 5:,} more"
