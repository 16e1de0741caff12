"""Long Range Arena (https://arxiv.org/abs/2011.04006): thousands of tokens.

Trains: listops, the value of nested lists of digits; text, whether a film review is in
    favour; retrieval, whether one of two papers cites the other; pathfinder32,
    pathfinder64, pathx (128 x 128), path256 and path512, whether a curve joins two
    disks in a picture, read pixel by pixel; image, CIFAR-10 in grey. pathfinder16 and
    pathfinder24 are no task of the arena. ListOps and Pathfinder are made on the first
    start below data.folder (`python -m train.data.prepare` makes them before), or
    converted from the arena's own files, data.path; retrieval has those only. variant:
    what a pixel or a text is to the model: lra, one of 256 tokens, bytes; s4, a number
    in [0, 1], characters; s5, a number in [-1, 1]; "" takes that of the layer's
    settings.
    scale=paper: the arena's task, with the published settings of the layer; attention
    takes those of the Transformer that is trained with self-pretraining and without
    (https://arxiv.org/abs/2310.02980); layers that have none start from S4's;
    pathfinder64 takes those of pathfinder32, path256 and path512 those of pathx, which
    no paper says of them.
    scale=small: 20,000 examples and a model of 4 x 64; expressions of 20 to 100 tokens,
    texts of 512.
Hardware: small: a laptop's CPU (2 cores); paper: one GPU of 16 GB or more.
Time: small: minutes for listops, pathfinder16 and pathfinder24, hours for others;
    paper: some 15 minutes per epoch of S4 on a T4 for listops, 40 epochs
    (https://github.com/state-spaces/s4, models/s4/experiments.md).
Score: paper, test accuracy, ListOps, Text, Retrieval, Image, Pathfinder, Path-X: S4
    59.60, 86.82, 90.90, 88.65, 94.20, 96.35, S4D-LegS 60.47, 86.18, 89.46, 88.19,
    93.06, 91.95 (https://arxiv.org/abs/2206.11893), S5 62.15, 89.31, 91.40, 88.00,
    95.33, 98.58 (https://arxiv.org/abs/2208.04933), Transformer 36.37, 64.27, 57.46,
    42.44, 71.40, chance (https://github.com/google-research/long-range-arena); the
    reviews of text choose the step too. small: no paper reports it; `python -m
    train.reproduce.baseline` with the same config gives the score of counting tokens.

    python -m train.main --config lra:listops,layer=s4d,scale=small
    python -m train.main --config lra:pathx,layer=s5,scale=paper
"""

from configs import common

SCALES = ("small", "paper")
VARIANTS = ("", "lra", "s4", "s5")

SIDES = {
    "pathfinder16": 16,
    "pathfinder24": 24,
    "pathfinder32": 32,
    "pathfinder64": 64,
    "pathx": 128,
    "path256": 256,
    "path512": 512,
}
TASKS = ("listops", "text", "retrieval", *SIDES, "image")

EXAMPLES = {
    "small": dict(train=20_000, validation=2_000, test=2_000),
    "listops": dict(train=96_000, validation=2_000, test=2_000),
    "pathfinder": dict(train=160_000, validation=20_000, test=20_000),
}
LISTOPS = {
    "small": dict(  # both lengths excluded
        **EXAMPLES["small"], min_length=20, max_length=100, max_depth=5, max_args=5
    ),
    "paper": dict(
        **EXAMPLES["listops"],
        min_length=500,
        max_length=2_000,
        max_depth=10,
        max_args=10,
    ),
}

# Tokens of a text: of the arena's paper, and of both traditions' code.
LENGTHS = {"text": 4096, "retrieval": 4000}
SHORT = 512  # of a small run

# Self-pretraining, where config.pretrain.steps asks for it
# (https://arxiv.org/abs/2310.02980): the share of tokens that are hidden, and whether a
# pixel is one of 256 classes or a number.
PRETRAIN = {
    "listops": dict(ratio=0.1),
    "text": dict(ratio=0.15),
    "retrieval": dict(ratio=0.15),
    "image": dict(ratio=0.5),
    "pathfinder": dict(ratio=0.5, levels=256),
    "pathx": dict(ratio=0.5, levels=256),
}

S4_LIKE = ("s4", "s4d", "dss")  # a state for every feature

# Published settings by task. layer_args: those fields that the layer has. ssm_lr: of
# the sensitive parameters of a state-space model, apart from those of `apart`, (names,
# rate as a share of optimizer.lr, decay).

# https://github.com/state-spaces/s4, configs/experiment/lra
S4_PATHFINDER = dict(
    model=dict(depth=6, features=256),
    layer_args=dict(state_size=64),
    optimizer=dict(lr=4e-3, weight_decay=0.05, warmup=-50_000),
    ssm_lr=1e-3,
    variant="s4",
    train=dict(steps=500_000, batch_size=64),
)
S4_PATHX = {
    **S4_PATHFINDER,
    "layer_args": dict(state_size=64, dt_min=1e-4),
    "optimizer": dict(lr=1e-3, weight_decay=0.05, warmup=-50_000),
    "train": dict(steps=500_000, batch_size=16),
}
S4_TEXT = dict(
    model=dict(depth=6, features=256),
    layer_args=dict(state_size=4, copies=1),
    optimizer=dict(lr=1e-2, weight_decay=0.05, warmup=-5_000),
    ssm_lr=1e-3,
    apart=("log_dt|log_step", 1.0, 0.0),
    variant="s4",
    train=dict(steps=50_000, batch_size=16),
)
S4 = {
    "listops": {
        **S4_TEXT,
        "model": dict(depth=6, features=256, prenorm=False),
        "optimizer": dict(lr=1e-2, weight_decay=0.05, warmup=-12_000),
        "train": dict(steps=120_000, batch_size=32),
    },
    "text": S4_TEXT,
    "retrieval": {**S4_TEXT, "train": dict(steps=50_000, batch_size=64)},
    "image": dict(
        model=dict(depth=6, features=512, prenorm=False, dropout=0.1),
        layer_args=dict(state_size=64, copies=1),
        optimizer=dict(lr=1e-2, weight_decay=0.05, warmup=-18_000),
        ssm_lr=1e-3,
        train=dict(steps=180_000, batch_size=50),
    ),
    "pathfinder": S4_PATHFINDER,
    "pathx": S4_PATHX,
}

# https://github.com/lindermanlab/S5, bin/run_experiments; what does not decay there by
# intention, norms and biases, does not decay here.
S5 = {
    "listops": dict(
        model=dict(depth=8, features=128, gate="half_glu2"),
        layer_args=dict(state_size=16, blocks=8),
        optimizer=dict(lr=3e-3, weight_decay=0.04, warmup=-1_920),
        ssm_lr=1e-3,
        apart=("B", 1.0, 1.0),
        train=dict(steps=76_800, batch_size=50),
    ),
    "text": dict(
        model=dict(depth=6, features=256, gate="half_glu2", dropout=0.1),
        layer_args=dict(state_size=192, blocks=12),
        optimizer=dict(lr=4e-3, weight_decay=0.07),
        ssm_lr=1e-3,
        apart=("log_step", 1.0, 1.0),
        variant="s4",
        train=dict(steps=17_500, batch_size=50),  # 35 epochs
    ),
    "retrieval": dict(
        model=dict(depth=6, features=128, gate="half_glu1"),
        layer_args=dict(state_size=256, blocks=16, c_init="trunc_standard_normal"),
        optimizer=dict(lr=2e-3, weight_decay=0.05, warmup=-4_597),
        ssm_lr=1e-3,
        apart=("log_step", 1.0, 1.0),
        variant="s4",
        train=dict(steps=91_940, batch_size=32),  # 20 epochs
    ),
    "image": dict(
        model=dict(depth=6, features=512, gate="half_glu1", dropout=0.1),
        layer_args=dict(state_size=384, blocks=3, clip_eigs=True),
        optimizer=dict(lr=4.5e-3, weight_decay=0.07, warmup=-900),
        ssm_lr=1e-3,
        apart=("B", 1.0, 1.0),
        train=dict(steps=225_000, batch_size=50),  # 250 epochs
    ),
    "pathfinder": dict(
        model=dict(depth=6, features=192, gate="half_glu1", dropout=0.05),
        layer_args=dict(state_size=256, blocks=8, c_init="trunc_standard_normal"),
        optimizer=dict(lr=4.5e-3, weight_decay=0.03, warmup=-2_500),
        ssm_lr=9e-4,
        variant="s5",
        train=dict(steps=500_000, batch_size=64),  # 200 epochs
    ),
    "pathx": dict(
        model=dict(depth=6, features=128, gate="half_glu1"),
        layer_args=dict(
            state_size=256, blocks=16, c_init="complex_normal", dt_min=1e-4
        ),
        optimizer=dict(lr=1.8e-3, weight_decay=0.06, warmup=-5_000),
        ssm_lr=6e-4,
        apart=("B", 1 / 3, 1.0),
        variant="s5",
        train=dict(steps=375_000, batch_size=32),  # 75 epochs
    ),
}

# The Transformer of "Never Train from Scratch", https://arxiv.org/abs/2310.02980,
# appendix C, and its repository's defaults, configs/experiment/lra: rotary positions,
# both directions, a constant rate after its warmup. Its MLPs are not gated: ours have
# two thirds of their width, and so as many parameters. On Path-X it has blocks of
# 4,096 tokens, and here all tokens see one another. Steps are those of S4.
TRANSFORMER = {
    task: dict(
        model=dict(depth=depth, features=features, norm="layer", mlp=2 / 3 * mlp),
        layer_args=dict(heads=heads),
        optimizer=dict(lr=lr, weight_decay=decay, warmup=-2_000, schedule="constant"),
        ssm_lr=lr,
        pretrain=dict(lr=pretrain_lr),
        variant="s4",
        train=S4[task]["train"],
    )
    for task, depth, features, heads, mlp, lr, decay, pretrain_lr in (
        ("listops", 6, 512, 8, 4, 1e-4, 0.0, 1e-3),
        ("text", 6, 512, 8, 4, 5e-4, 0.1, 5e-4),
        ("retrieval", 4, 128, 4, 4, 5e-4, 0.0, 5e-3),
        ("image", 3, 64, 4, 2, 1e-3, 0.0, 1e-3),
        ("pathfinder", 4, 128, 8, 1, 5e-4, 0.0, 1e-3),
        ("pathx", 4, 128, 4, 1, 5e-4, 0.0, 1e-3),
    )
}

RECIPES = {"s5": S5, "attention": TRANSFORMER}  # of other layers S4's

# What a small run changes of these.
SMALL = {
    "listops": dict(
        model=dict(depth=4, features=64),
        optimizer=dict(lr=4e-3, warmup=-200),
        train=dict(steps=2_000, batch_size=32),
    ),
    "other": dict(
        model=dict(depth=4, features=64, dropout=0.0),
        layer_args=dict(state_size=64, blocks=1),
        optimizer=dict(lr=4e-3, warmup=-200),
        train=dict(steps=2_000, batch_size=32),
    ),
}
# And of a layer whose rate is another.
SMALL_LAYERS = {"attention": dict(optimizer=dict(lr=1e-3))}


def get_config(arg="listops"):
    """`TASK[,layer=NAME][,scale=small|paper][,variant=lra|s4|s5]`, NAME s4, s4d, s5,
    another key of LAYER_ARGS or the dotted path of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", scale=SCALES, variant=VARIANTS)
    config = common.base()
    recipe = RECIPES.get(arg.layer, S4)[_published(arg.task)]
    config.data.update(_data(arg, recipe))
    config.model.norm = "batch"
    config.model.head = "retrieval" if arg.task == "retrieval" else "mean"
    common.set_layer(config, arg.layer)
    config.optimizer.clip = 0.0
    common.apply(config, dict(layer_args=dict(spectrum="legs", bidirectional=True)))
    common.apply(config, recipe)
    if arg.layer not in (*S4_LIKE, *RECIPES):  # another kind of state, so its own size
        common.set_layer(config, arg.layer)
        common.apply(config, dict(layer_args=dict(bidirectional=True)))
    if arg.scale == "small":
        common.apply(config, SMALL.get(arg.task, SMALL["other"]))
        common.apply(config, SMALL_LAYERS.get(arg.layer, {}))
        config.optimizer.schedule = "cosine"
    config.groups = common.groups(recipe["ssm_lr"] / config.optimizer.lr)
    if "apart" in recipe:
        names, rate, decay = recipe["apart"]
        own = dict(lr=rate, wd=decay, optional=True)
        config.groups.insert(0, (rf".*/({names})", own))
    config.pretrain.update(PRETRAIN[_published(arg.task)])
    if arg.scale == "paper":
        config.pretrain.update(recipe.get("pretrain", {}))
    if config.data.get("variant") == "s5":
        config.pretrain.low = -1.0
    steps = config.train.steps
    config.train.update(
        eval_every=steps // 20, log_every=steps // 200, checkpoint_every=steps // 20
    )
    return config


def _published(task):
    """The task whose published settings are taken."""
    if task not in SIDES:
        return task
    return "pathfinder" if SIDES[task] <= 64 else "pathx"


def _data(arg, recipe):
    variant = arg.variant or recipe.get("variant", "s4")
    valid = {"listops": ("s4",), "image": ("s4",)} | dict.fromkeys(SIDES, VARIANTS)
    valid = valid.get(arg.task, ("lra", "s4"))
    if variant not in valid:
        raise ValueError(
            f"config argument variant must be one of {', '.join(filter(None, valid))} "
            f"for {arg.task}, got {variant!r}"
        )
    made = dict(
        path="",  # a folder with the arena's own files, instead of making them
        seed=0,  # of the data that are made, not of the run
    )
    if arg.task in LENGTHS:
        small = arg.scale == "small"
        length = SHORT if small else LENGTHS[arg.task]
        data = dict(length=length, variant=variant)
        if arg.task == "retrieval":
            return dict(name="aan", path="", folder="data/aan", **data)
        share = 0.1 if small else 0.0  # of the training reviews; 0: the test's are
        data |= dict(validation=share, download=False)
        return dict(name="imdb", folder="data/imdb", **data)
    if arg.task == "image":
        return dict(name="cifar", folder="data/cifar10", color="gray", download=False)
    if arg.task == "listops":
        folder = "data/listops"  # gets what is made
        return dict(name="listops", folder=folder, **made, **LISTOPS[arg.scale])
    return dict(
        name="pathfinder",
        folder="data/pathfinder",
        side=SIDES[arg.task],
        contour=0,  # paddles of a long snake; 0: 14, or as many as fit
        variant=variant,
        layout="sequence",  # image
        **made,
        **EXAMPLES["small" if arg.scale == "small" else "pathfinder"],
    )
