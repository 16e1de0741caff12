"""Images read as grids: a layer of the project along rows and columns.

Trains: digits: the 1,293 images of 8x8 pixels of configs/pixels.py, shifted by up to
    one pixel (no download). mnist: 28x28; cifar: 32x32 in three colors (or
    data.color=gray). Their original files lie in data.folder; a file that is missing is
    named with its address, and data.download=True fetches it. Every pixel of digits is
    a place of the grid, of mnist and cifar every patch of 2x2 (model.patch).
    scheme=separable: rows, then columns, as S4ND (https://arxiv.org/abs/2210.06583);
    axis_sum: rows plus columns; cross: the whole image row by row and column by column
    (https://arxiv.org/abs/2401.10166). Every layer reads in both directions.
Hardware: digits: a laptop's CPU (2 cores). mnist, cifar: one GPU of 16 GB.
Time and score: digits: test accuracy 0.986 for S4D, separable, seed 0, after 6 minutes
    on a busy CPU; one run, and no paper reports this split. mnist, cifar: not run yet.

    python -m train.main --config images:digits,layer=s4d,scheme=cross
    python -m train.main --config images:cifar,layer=mamba
"""

from configs import common

TASKS = ("digits", "mnist", "cifar")
SCHEMES = ("separable", "axis_sum", "cross")

DATA = {
    "digits": dict(name="digits", target="label", augment="shift"),  # none, affine
    "mnist": dict(name="mnist", folder="data/mnist", download=False),
    "cifar": dict(name="cifar", folder="data/cifar10", color="rgb", download=False),
}


def get_config(arg="digits"):
    """`TASK[,layer=NAME][,scheme=separable|axis_sum|cross]`; NAME s4d, another key of
    LAYER_ARGS or the dotted path of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", scheme=SCHEMES)
    config = common.base()
    common.set_layer(config, arg.layer)
    # One layer for both directions where it can be; `Grid` has the others.
    common.apply(config, dict(layer_args=dict(bidirectional=True)))
    config.data.update(DATA[arg.task], layout="image")
    config.model.update(grid=arg.scheme, dropout=0.1)
    config.optimizer.lr = 4e-3
    if arg.task == "digits":
        config.train.update(steps=1200, eval_every=200, log_every=100, ema=0.99)
    else:
        config.model.patch = 2
        config.optimizer.warmup = -500
        config.train.update(
            steps=20_000, eval_every=1_000, log_every=100, checkpoint_every=1_000
        )
    return config
