"""Images read pixel by pixel.

Trains: digits: 1,293 images of 8x8 pixels with 17 grey levels from scikit-learn's own
    data (no download), shifted by up to one pixel; 144 choose the best step, 360 are
    the test. `target=label` names the digit after the last pixel, `target=next`
    predicts each pixel from those before.
    smnist, pmnist: MNIST, 784 pixels in [0, 1], row by row or permuted (bit reversal,
    or data.permutation=random). scifar: CIFAR-10, 1,024 pixels of three colors (or
    data.color=gray). Their original files lie in data.folder; a file that is missing
    is named with its address, and data.download=True fetches it. scale=paper: the
    published settings of S4 or S5; layers that have none start from S4's.
    scale=small: 4 x 64 and few steps.
Hardware: digits, scale=small: a laptop's CPU (2 cores). scale=paper: one GPU of 16 GB.
Time and score: digits: the table in docs/results.md, by `python -m train.reproduce`;
    no paper reports this split. small: minutes to an hour, no paper reports it. paper,
    test accuracy: smnist: S4 99.55 in 20 epochs of 17 s on an A100
    (https://github.com/srush/annotated-s4), 99.63 (https://arxiv.org/abs/2111.00396);
    pmnist: S4 98.70 (there); scifar: S4 91.80, S4D-LegS 89.92
    (https://arxiv.org/abs/2206.11893), S5 90.10 (https://arxiv.org/abs/2208.04933).

    python -m train.main --config pixels:digits,layer=s5
    python -m train.main --config pixels:smnist,layer=s4d,scale=small
"""

from configs import common

TASKS = ("digits", "smnist", "pmnist", "scifar")
TARGETS = ("label", "next")
SCALES = ("small", "paper")

MNIST = dict(name="mnist", folder="data/mnist", permutation="none", download=False)
CIFAR = dict(name="cifar", folder="data/cifar10", color="rgb", download=False)
DATA = {
    "smnist": MNIST,
    "pmnist": {**MNIST, "permutation": "bit_reversal"},
    "scifar": CIFAR,
}

# layer_args: those fields that the layer has. ssm_lr: of the sensitive parameters of a
# state-space model, B not among them where B_decays. Epochs are of the 54,000 or 45,000
# training images.

# https://github.com/srush/annotated-s4, README.md; it has no settings for pmnist.
S4_MNIST = dict(
    model=dict(depth=4, features=128, norm="layer", dropout=0.25),
    layer_args=dict(state_size=64),
    optimizer=dict(lr=5e-3, weight_decay=0.01),
    ssm_lr=5e-4,
    train=dict(steps=8_440, batch_size=128),  # 20 epochs
)
S4 = {
    "smnist": S4_MNIST,
    "pmnist": S4_MNIST,
    # https://github.com/state-spaces/s4, configs/experiment/cifar/s4-cifar.yaml
    "scifar": dict(
        model=dict(depth=6, features=512, norm="layer", prenorm=False, dropout=0.1),
        layer_args=dict(state_size=64, copies=2, spectrum="legs", bidirectional=True),
        optimizer=dict(lr=1e-2, weight_decay=0.05, warmup=-900),
        ssm_lr=1e-3,
        train=dict(steps=180_000, batch_size=50),  # 200 epochs
    ),
}

# After https://arxiv.org/abs/2208.04933, table 11, not checked against runs of its
# authors; for scifar, what it leaves open is as for the gray images in
# https://github.com/lindermanlab/S5, bin/run_experiments.
S5 = {
    "smnist": dict(
        model=dict(depth=4, features=96, norm="batch", gate="half_glu1", dropout=0.1),
        layer_args=dict(state_size=128, blocks=1, bidirectional=True),
        optimizer=dict(lr=8e-3, weight_decay=0.01, warmup=-1_080),
        ssm_lr=2e-3,
        train=dict(steps=162_000, batch_size=50),  # 150 epochs
    ),
    "pmnist": dict(
        model=dict(depth=4, features=128, norm="batch", gate="half_glu1", dropout=0.15),
        layer_args=dict(state_size=128, blocks=2, bidirectional=True),
        optimizer=dict(lr=4e-3, weight_decay=0.01, warmup=-1_080),
        ssm_lr=1e-3,
        train=dict(steps=162_000, batch_size=50),
    ),
    "scifar": dict(
        model=dict(depth=6, features=512, norm="batch", gate="half_glu1", dropout=0.1),
        layer_args=dict(state_size=384, blocks=3, bidirectional=True, clip_eigs=True),
        optimizer=dict(lr=4.5e-3, weight_decay=0.07, warmup=-900),
        ssm_lr=1e-3,
        B_decays=True,
        train=dict(steps=225_000, batch_size=50),  # 250 epochs
    ),
}

# What a small run changes of these.
SMALL = dict(
    model=dict(depth=4, features=64, dropout=0.1),
    layer_args=dict(state_size=64, blocks=1),
    optimizer=dict(lr=4e-3, warmup=-200),
    train=dict(steps=2_000, batch_size=32),
)


def get_config(arg="digits"):
    """`TASK[,layer=NAME]` and, for digits, `[,target=label|next]`, for the others
    `[,scale=small|paper]`; NAME s4d, s5, another key of LAYER_ARGS or the dotted path
    of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", target=TARGETS, scale=SCALES)
    config = common.base()
    common.set_layer(config, arg.layer)
    if arg.task == "digits":
        if arg.scale != "small":
            raise ValueError("config argument scale must be small for digits")
        _digits(config, arg.target)
    else:
        if arg.target != "label":
            raise ValueError(f"config argument target must be label for {arg.task}")
        _published(config, arg)
    return config


def _digits(config, target):
    config.model.head = "token" if target == "next" else "mean"
    config.data.update(
        name="digits",
        target=target,
        augment="shift",  # none, shift, affine
    )
    config.model.dropout = 0.1
    config.optimizer.lr = 4e-3
    config.train.update(steps=1200, eval_every=200, log_every=100, ema=0.99)


def _published(config, arg):
    config.data.update(DATA[arg.task])
    config.optimizer.clip = 0.0
    recipe = (S5 if arg.layer == "s5" else S4)[arg.task]
    common.apply(config, recipe)
    if arg.scale == "small":
        common.apply(config, SMALL)
    config.groups = common.groups(recipe["ssm_lr"] / config.optimizer.lr)
    if recipe.get("B_decays"):
        config.groups.insert(0, (r".*/B", dict(lr=1.0, wd=1.0, optional=True)))
    steps = config.train.steps
    often = 4 if arg.scale == "small" else 20  # 6,000 images take as long as 60 steps
    config.train.update(
        eval_every=steps // often,
        log_every=steps // 200,
        checkpoint_every=steps // often,
    )
