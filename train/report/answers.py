"""A model's answers to examples of a split, and how a page shows them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm.sequence import Sequence
from train import signals
from train.draw import figures
from train.draw.markup import figure, paragraph, table, text
from train.losses import IGNORED
from train.runs import Run

LIMIT = 2**20  # tokens that are answered, or one batch
SHOWN = 8  # right and wrong examples
TOKENS = 200  # of an example that is shown as text
ARROW = "\N{RIGHTWARDS ARROW}"


class Answers(NamedTuple):
    """The answers to the first examples of a split.

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
    sources, spec = run.dataset.sources, run.spec
    split = next(s for s in ("validation", "test", "train") if s in sources)
    total, options = run.dataset.num_examples(split), run.config.train
    size = min(options.eval_batch_size or options.batch_size, total)
    compiled = _compiled(run.model, spec)
    kept, tokens = [], 0
    for batch in signals.stoppable(run.dataset.evaluation(split, size)):
        outputs, confidence = jax.device_get(compiled(run.variables, dict(batch)))
        found = {k: batch[k] for k in ("inputs", "targets", "mask")}
        found |= {"outputs": outputs, "confidence": confidence}
        real = batch["mask"].reshape(size, -1).any(axis=1)
        kept.append({k: None if v is None else v[real] for k, v in found.items()})
        tokens += batch["mask"].size
        if tokens >= LIMIT:
            break
    columns = {
        k: None if first is None else np.concatenate([row[k] for row in kept])
        for k, first in kept[0].items()
    }
    return Answers(split, total, **columns)


def _compiled(model, spec):
    """The jitted (variables, batch) -> outputs, confidence of `Answers`."""

    @jax.jit
    def answered(variables, batch):
        mask = batch["mask"] if spec.padded else None
        sequence = Sequence(mask, batch.get("reset"), batch.get("dt"))
        y, _ = model.apply(variables, batch["inputs"], sequence=sequence)
        if spec.loss == "regression":
            return y, None
        return jnp.argmax(y, axis=-1), jnp.max(jax.nn.softmax(y), axis=-1)

    return answered


def section(found: Answers, spec, step: int) -> str:
    """HTML: how right the answers are, and examples."""
    shown = {"classification": _classes, "token": _tokens, "regression": _values}
    said = f"The {found.split} split, checkpoint of step {step:,}"
    if len(found.outputs) < found.total:
        said += f"; the first {len(found.outputs):,} of {found.total:,} examples"
    return paragraph(said + ".", "soft") + shown[spec.loss](found, spec)


def _classes(found, spec):
    targets, answers = found.targets, found.outputs
    counts = np.zeros((spec.outputs, int(max(spec.outputs, answers.max() + 1))))
    np.add.at(counts, (targets, answers), 1)
    right, wrong = (np.flatnonzero(x) for x in (answers == targets, answers != targets))
    wrong = wrong[np.argsort(-found.confidence[wrong], kind="stable")]
    caption = (
        f"{len(right):,} of {len(targets):,} are right. Rows: the class; columns: "
    )
    caption += "the answer; colour: its share of the class."
    parts = [figure(figures.confusion(counts, spec.classes), caption)]
    right, surest = right[:SHOWN], wrong[:SHOWN]
    labels = _names(targets[right], spec)
    parts.append(_examples(found, spec, right, labels, "Right: the first of the split"))
    told = zip(
        _names(targets[surest], spec),
        _names(answers[surest], spec),
        found.confidence[surest],
        strict=True,
    )
    labels = [f"{target} {ARROW} {it} ({sure:.0%})" for target, it, sure in told]
    title = f"Wrong, {len(wrong):,} in all: those of which the model was surest"
    parts.append(_examples(found, spec, surest, labels, title))
    return "".join(parts)


def _tokens(found, spec):
    counted = found.mask & (found.targets != IGNORED)
    correct = counted & (found.outputs == found.targets)
    caption = (
        f"Accuracy by position; {correct.sum():,} of {counted.sum():,} tokens are "
    )
    parts = [figure(figures.positions(correct, counted), caption + "right.")]
    parts.append(paragraph("The first examples, wrong answers underlined:", "soft"))
    for row in range(min(3, len(counted))):
        places = np.flatnonzero(counted[row])[:TOKENS]
        targets, answers = found.targets[row, places], found.outputs[row, places]
        marked = [
            text(word) if target == token else f"<mark>{text(word)}</mark>"
            for word, target, token in zip(
                _names(answers, spec), targets, answers, strict=True
            )
        ]
        said = text(" ".join(_names(targets, spec)))
        parts.append(f"<pre>target  {said}\nanswer  {' '.join(marked)}</pre>\n")
    return "".join(parts)


def _values(found, spec):
    outputs, targets = found.outputs, found.targets
    if targets.ndim == outputs.ndim - 1:
        targets = targets[..., None]
    per_token = outputs.ndim == 3
    real = found.mask if per_token else np.ones(len(outputs), bool)
    caption = "Predictions over targets, with the diagonal"
    caption += "; a colour per output." if targets.shape[-1] > 1 else "."
    parts = [figure(figures.truth(outputs[real], targets[real]), caption)]
    error = np.abs(outputs - targets).mean(axis=-1)
    if per_token:
        error = (error * real).sum(axis=1) / np.maximum(real.sum(axis=1), 1)
    order = np.argsort(error, kind="stable")
    few = max(1, min(len(order), SHOWN // 2 if per_token else SHOWN) // 2)
    chosen = order if len(order) == 1 else np.r_[order[:few], order[-few:]]
    title = "the smallest errors, then the largest"
    if per_token:
        drawn = figures.followed(outputs[chosen], targets[chosen], found.mask[chosen])
        parts.append(figure(drawn, f"Output 0 by token: {title}.", above=True))
    else:
        labels = [f"{targets[i, 0]:.3g} {ARROW} {outputs[i, 0]:.3g}" for i in chosen]
        title = f"Target {ARROW} prediction of output 0: {title}"
        parts.append(_examples(found, spec, chosen, labels, title))
    return "".join(parts)


def _examples(found, spec, rows, labels, title):
    """Some inputs with what is to be said of each: pictures, text or lines."""
    if not len(rows):
        return ""
    inputs, mask = found.inputs[rows], found.mask[rows]
    if spec.encoder == "token":
        shown = []
        for x, real, label in zip(inputs, mask, labels, strict=True):
            words = _words(x[real][:TOKENS], spec)
            rest = " ..." if real.sum() > TOKENS else ""
            shown.append((label, " ".join(words) + rest))
        return paragraph(f"{title}.", "soft") + table((), shown)
    images = _images(inputs, mask, spec)
    if images is not None:
        return figure(figures.pictures(images, labels), f"{title}.", above=True)
    if mask.ndim == 3:  # two documents, one after the other
        inputs, mask = (x.reshape(len(x), -1, *x.shape[3:]) for x in (inputs, mask))
    return figure(figures.lines(inputs, mask, labels), f"{title}.", above=True)


def _images(inputs, mask, spec):
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


def _names(classes, spec):
    """The names of classes, or their numbers; of tokens that are predicted, what these
    are called."""
    names = spec.classes or (spec.symbols if spec.loss == "token" else ())
    return [names[i] if i < len(names) else str(i) for i in classes]
