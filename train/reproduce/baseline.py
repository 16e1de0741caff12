"""What a linear classifier makes of a config's task: the score that a model must beat.

    python -m train.reproduce.baseline --config lra:listops,scale=small

Multinomial logistic regression on the same splits. It sees of tokens how often each
occurs and which comes first, of other sequences all values.
"""

import warnings

import numpy as np

from train import data
from train import main as command_line

BATCH = 1_000


def features(spec, inputs, mask) -> np.ndarray:
    """[B, F] float32 features of the examples' real tokens.

    Tokens [B, L]: their counts and, one-hot, the first. Numbers: all, padding as 0.
    """
    if spec.encoder == "image":
        inputs = inputs.reshape(*mask.shape, -1)
    if spec.encoder != "token":
        real = mask.reshape(
            *inputs.shape[: mask.ndim], *[1] * (inputs.ndim - mask.ndim)
        )
        return np.where(real, inputs, 0).reshape(len(inputs), -1).astype(np.float32)
    rows = np.arange(len(inputs))[:, None]
    counts = np.zeros((len(inputs), 2 * spec.vocab_size), np.float32)
    np.add.at(counts, (np.broadcast_to(rows, inputs.shape), inputs), mask)
    counts[rows[:, 0], spec.vocab_size + inputs[rows[:, 0], mask.argmax(1)]] = 1
    return counts


def logistic_regression(dataset: data.Dataset) -> float:
    """Test accuracy after fitting the training split.

    Raises:
        ValueError: a dataset without one class per sequence, or without a test split.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    loss = dataset.spec.loss
    if loss != "classification":
        raise ValueError(
            f"dataset: its loss must be 'classification' for a baseline, got {loss!r}"
        )

    def arrays(split):
        parts = [
            (features(dataset.spec, b["inputs"], b["mask"]), b["targets"], b["mask"])
            for b in dataset.evaluation(split, BATCH)
        ]
        x, y, mask = map(np.concatenate, zip(*parts, strict=True))
        real = mask.reshape(len(mask), -1).any(axis=1)
        return x[real], y[real]

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        # Hundreds of steps of a convex problem: the last digits do not matter here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*arrays("train"))
    return model.score(*arrays("test"))


def main(argv: list[str]) -> int:
    command_line.check_arguments(argv)
    dataset = data.load(command_line.CONFIG.value.data)
    accuracy = logistic_regression(dataset)
    print(
        f"logistic regression: test accuracy {accuracy:.4f} "
        f"({dataset.num_examples('train')} to train on, "
        f"{dataset.num_examples('test')} to test)"
    )
    return 0


if __name__ == "__main__":
    command_line.command(main)
