"""A model's answers to examples of a split, and how a page shows them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm.sequence import Sequence
from train import signals, stream
from train.draw import figures
from train.draw.markup import counts, figure, paragraph, table, text
from train.losses import IGNORED, LOSSES
from train.report import some
from train.runs import Run

LIMIT = 2**20  # tokens that are answered, or one batch
SHOWN = 8  # right and wrong examples
TOKENS = 200  # of an example that is shown as text
CLASSES = 20  # at most, in a table of them
CONFUSIONS = 10  # of more classes than that, those that are named
ARROW = "\N{RIGHTWARDS ARROW}"


class Answers(NamedTuple):
    """The answers to examples of a split, evenly spaced where there are many.

    Attributes:
        split, total: which one, and how many examples it has.
        inputs, targets, mask: of the examples, [n, ...].
        outputs: predicted class [n] or [n, L], or the regressed values.
        confidence: the probability of the predicted class; None for a regression.
    """

    split: str
    total: int
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    outputs: np.ndarray
    confidence: np.ndarray | None


def answer(run: Run) -> Answers:
    """The run's answers on the validation split, else on the first that there is."""
    sources = run.dataset.sources
    split = next(s for s in ("validation", "test", "train") if s in sources)
    total, options = run.dataset.num_examples(split), run.config.train
    size = min(options.eval_batch_size or options.batch_size, total)
    dataset = some.of(run.dataset, split, LIMIT, size)
    answering, parts = _answering(run), []
    for batch in signals.stoppable(dataset.evaluation(split, size)):
        outputs, confidence = answering(batch)
        fields = {k: batch[k] for k in ("inputs", "targets", "mask")}
        fields |= {"outputs": outputs, "confidence": confidence}
        real = batch["mask"].reshape(size, -1).any(axis=1)
        parts.append({k: None if v is None else v[real] for k, v in fields.items()})
    columns = {
        k: None if first is None else np.concatenate([row[k] for row in parts])
        for k, first in parts[0].items()
    }
    return Answers(split, total, **columns)


def _answering(run):
    """batch -> outputs, confidence of `Answers`, on the host; in pieces where the run
    was trained so, each with an answer at every token."""
    spec, chunk = run.spec, run.config.train.chunk

    @jax.jit
    def answered(variables, batch, state):
        mask = batch["mask"] if spec.padded else None
        sequence = Sequence(mask, batch.get("reset"), batch.get("dt"))
        y, state = run.model.apply(variables, batch["inputs"], state, sequence)
        if LOSSES[spec.loss].numbers:
            return (y, None), state
        return (jnp.argmax(y, axis=-1), jnp.max(jax.nn.softmax(y), axis=-1)), state

    def at_once(batch):
        return jax.device_get(answered(run.variables, dict(batch), None)[0])

    def in_pieces(batch):
        arrays = {name: batch[name] for name in stream.ALONG if name in batch}
        found = [
            jax.device_get(answers)
            for answers, _ in stream.over(
                lambda piece, state: answered(run.variables, piece, state),
                run.model.init_state(len(batch["mask"])),
                arrays,
                chunk,
            )
        ]
        return jax.tree.map(lambda *pieces: np.concatenate(pieces, axis=1), *found)

    return in_pieces if chunk else at_once


def section(examples: Answers, spec, step: int, chance: float | None = None) -> str:
    """HTML: how right the answers are, and examples, right and wrong ones of every
    kind. `chance` is the accuracy without reading the inputs, where it is known."""
    sections = {"classification": _classes, "token": _tokens}
    show = sections.get(spec.loss, _values)
    note = f"The {examples.split} split, checkpoint of step {step:,}"
    if len(examples.outputs) < examples.total:
        note += (
            f"; {len(examples.outputs):,} of {examples.total:,} examples, evenly spaced"
        )
    return paragraph(note + ".", "soft") + show(examples, spec, chance)


def _classes(examples, spec, chance):
    targets, answers = examples.targets, examples.outputs
    table_of = np.zeros((spec.outputs, int(max(spec.outputs, answers.max() + 1))))
    np.add.at(table_of, (targets, answers), 1)
    right, wrong = (np.flatnonzero(x) for x in (answers == targets, answers != targets))
    wrong = wrong[np.argsort(-examples.confidence[wrong], kind="stable")]
    caption = (
        f"{len(right):,} of {len(targets):,} are right. Rows: the class; columns: "
    )
    caption += "the answer; colour: its share of the class."
    if table_of.shape[1] <= CLASSES:
        names = _names(range(table_of.shape[1]), spec)
        drawn = counts(table_of, names[: len(table_of)], names)
        parts = [drawn, paragraph(caption, "soft")]
    else:
        parts = [figure(figures.confusion(table_of), caption)]
        parts.append(_confused(table_of, spec))
    rule = "a class at a time"
    chosen = mixed(targets, right)
    labels = _names(targets[chosen], spec)
    title = f"Right, {len(right):,} in all: the first of the split, {rule}"
    parts.append(_examples(examples, spec, chosen, labels, title))
    chosen = mixed(targets, wrong)
    named = zip(
        _names(targets[chosen], spec),
        _names(answers[chosen], spec),
        examples.confidence[chosen],
        strict=True,
    )
    labels = [
        f"{target} {ARROW} {answer} ({sure:.0%})" for target, answer, sure in named
    ]
    title = f"Wrong, {len(wrong):,} in all: those of which the model was surest, {rule}"
    parts.append(_examples(examples, spec, chosen, labels, title))
    return "".join(parts)


def _confused(table_of: np.ndarray, spec) -> str:
    """By name, what is taken for what most often: a figure of many classes has no room
    for their names."""
    off = table_of * ~np.eye(*table_of.shape, dtype=bool)
    largest = np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(place, off.shape[1]) for place in largest if off.flat[place]]
    if not pairs:
        return ""
    rows = [
        (
            *_names((i, j), spec),
            f"{off[i, j]:.0f}",
            f"{off[i, j] / table_of[i].sum():.0%}",
        )
        for i, j in pairs
    ]
    title = paragraph("What is taken for what most often:", "soft")
    return title + table(("class", "answer", "times", "share of the class"), rows)


def mixed(classes: np.ndarray, rows: Iterable[int], most: int = SHOWN) -> np.ndarray:
    """At most `most` of the rows: the first of every class, then the second of every
    class and so on, in the order of the classes; of more classes than that, some that
    are evenly spaced.

    Args:
        classes: [n], of all rows.
        rows: some of them, the best first.
        most: how many are taken.
    """
    queues = {}
    for row in rows:
        queues.setdefault(classes[row], []).append(row)
    queues = figures.spread([queues[k] for k in sorted(queues)], most)
    rounds = [
        (turn, place, row)
        for place, queue in enumerate(queues)
        for turn, row in enumerate(queue[:most])
    ]
    taken = sorted(rounds)[:most]
    by_class = sorted(taken, key=lambda item: (item[1], item[0]))
    return np.array([row for _, _, row in by_class], int)


def _tokens(examples, spec, chance):
    counted = examples.mask & (examples.targets != IGNORED)
    correct = counted & (examples.outputs == examples.targets)
    caption = (
        f"Accuracy by position; {correct.sum():,} of {counted.sum():,} tokens are "
    )
    parts = [figure(figures.positions(correct, counted, chance), caption + "right.")]
    note = (
        "The example with the most right answers, one in the middle and the one with "
    )
    parts.append(paragraph(note + "the fewest; wrong answers are underlined:", "soft"))
    answered = np.flatnonzero(counted.any(axis=1))
    share = correct[answered].sum(axis=1) / counted[answered].sum(axis=1)
    order = answered[np.argsort(-share, kind="stable")]
    for row in figures.spread(order, 3):
        places = np.flatnonzero(counted[row])[:TOKENS]
        targets, answers = examples.targets[row, places], examples.outputs[row, places]
        padded, marked = [], []
        # In columns: a box that scrolls shows each answer below its target.
        for word, target, same in zip(
            _names(answers, spec),
            _names(targets, spec),
            answers == targets,
            strict=True,
        ):
            width = max(len(word), len(target))
            space = " " * (width - len(word))
            padded.append(target.ljust(width))
            word = text(word) if same else f"<mark>{text(word)}</mark>"
            marked.append(word + space)
        padded = text(" ".join(padded))
        parts.append(f"<pre>target  {padded}\nanswer  {' '.join(marked)}</pre>\n")
    return "".join(parts)


def _values(examples, spec, chance):
    outputs, targets = examples.outputs, examples.targets
    if targets.ndim == outputs.ndim - 1:
        targets = targets[..., None]
    per_token = outputs.ndim == 3
    real = examples.mask if per_token else np.ones(len(outputs), bool)
    real = real & np.isfinite(targets).all(axis=-1)  # what was not asked is NaN
    caption = "Predictions over targets, with the diagonal"
    caption += "; a colour per output." if targets.shape[-1] > 1 else "."
    parts = [figure(figures.truth(outputs[real], targets[real]), caption)]
    error = np.where(real, np.abs(outputs - targets).mean(axis=-1), 0)
    if per_token:
        error = error.sum(axis=1) / np.maximum(real.sum(axis=1), 1)
    order = np.argsort(error, kind="stable")
    chosen = figures.spread(order, SHOWN // 2 if per_token else SHOWN)
    title = "from the smallest error to the largest, evenly spaced between them"
    if per_token:
        labels = [f"error {error[i]:.3g}" for i in chosen]
        drawn = figures.followed(
            outputs[chosen], targets[chosen], examples.mask[chosen], labels
        )
        caption = f"Output 0 by token, {title}."
        parts.append(figure(drawn, caption, columns=2, above=True))
    else:
        labels = [f"{targets[i, 0]:.3g} {ARROW} {outputs[i, 0]:.3g}" for i in chosen]
        title = f"Target {ARROW} prediction of output 0, {title}"
        parts.append(_examples(examples, spec, chosen, labels, title))
    return "".join(parts)


def _examples(examples, spec, rows, labels, title):
    """Some inputs with what is to be said of each: pictures, text or lines."""
    if not len(rows):
        return ""
    inputs, mask = examples.inputs[rows], examples.mask[rows]
    if spec.encoder == "token":
        labelled = []
        for x, real, label in zip(inputs, mask, labels, strict=True):
            words = _words(x[real][:TOKENS], spec)
            ellipsis = " ..." if real.sum() > TOKENS else ""
            labelled.append((label, " ".join(words) + ellipsis))
        return paragraph(f"{title}.", "soft") + table((), labelled)
    images = _drawable(inputs, mask, spec)
    if images is not None:
        drawn = figures.pictures(images, labels)
        look = dict(columns=figures.THUMBS, least=5, above=True)
        return figure(drawn, f"{title}.", **look)
    if mask.ndim == 3:  # two documents, one after the other
        inputs, mask = (x.reshape(len(x), -1, *x.shape[3:]) for x in (inputs, mask))
    drawn = figures.lines(inputs, mask, labels)
    return figure(drawn, f"{title}.", columns=4, least=9.5, above=True)


def _drawable(inputs, mask, spec):
    """[n, h, w] or [n, h, w, 3] in [0, 1]; None for what forms no square image."""
    if spec.encoder != "image":
        side = math.isqrt(inputs.shape[1])
        one_number = inputs.size == mask.size
        if side < 4 or side**2 != inputs.shape[1] or not one_number or not mask.all():
            return None
        inputs = inputs.reshape(len(inputs), side, side, 1)
    images = inputs if inputs.shape[-1] == 3 else inputs[..., 0]
    low, high = images.min(), images.max()
    return (images - low) / max(high - low, 1e-9)


def _words(tokens, spec):
    """The dataset's symbols, or numbers where it names none."""
    symbols = spec.symbols
    return [str(symbols[token] if symbols else token) for token in tokens]


def _names(classes, spec) -> list[str]:
    """Of classes, or of tokens that are predicted, where the data say them; else their
    numbers."""
    return [spec.name(int(i)) for i in classes]
