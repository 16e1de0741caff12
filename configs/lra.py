"""Long Range Arena (https://arxiv.org/abs/2011.04006): thousands of tokens.

Trains: listops, the value of nested lists of digits, generated on the first start below
    data.folder (or converted from the LRA's own files: data.path).
    scale=paper: the LRA's task, 96,000 expressions of 500 to 2,000 tokens, with the
    published settings of the layer; layers that have none start from S4's.
    scale=small: 20,000 expressions of 20 to 100 tokens and a model of 4 x 64.
Hardware: small: a laptop's CPU (2 cores); paper: one GPU of 16 GB or more.
Time: small: minutes; paper: some 15 minutes per epoch of S4 on a T4, 40 epochs
    (https://github.com/state-spaces/s4, models/s4/experiments.md).
Score: paper, test accuracy: S4 59.6, S4D-LegS 60.5 (https://arxiv.org/abs/2206.11893),
    S5 62.2 (https://arxiv.org/abs/2208.04933), Transformer 36.4
    (https://github.com/google-research/long-range-arena). small: no paper reports it;
    `python -m train.reproduce.baseline` with the same config gives the score of
    counting tokens.

    python -m train.main --config lra:listops,layer=s4d,scale=small
"""

from configs import common

TASKS = ("listops",)
SCALES = ("small", "paper")

DATA = {
    "listops": dict(
        small=dict(
            train=20_000,
            validation=2_000,
            test=2_000,
            min_length=20,  # both excluded
            max_length=100,
            max_depth=5,
            max_args=5,
        ),
        paper=dict(
            train=96_000,
            validation=2_000,
            test=2_000,
            min_length=500,
            max_length=2_000,
            max_depth=10,
            max_args=10,
        ),
    ),
}

S4_LIKE = ("s4", "s4d", "dss")  # a state for every feature

# Published settings by task. layer_args: those fields that the layer has. ssm_lr: of
# the sensitive parameters of a state-space model, apart from `regular`, (names, decay),
# which learn at optimizer.lr.

# https://github.com/state-spaces/s4, configs/experiment/lra
S4 = {
    "listops": dict(
        model=dict(depth=6, features=256, prenorm=False),
        layer_args=dict(state_size=4, copies=1),
        optimizer=dict(lr=1e-2, weight_decay=0.05, warmup=-12_000),
        ssm_lr=1e-3,
        regular=("log_dt|log_step", 0.0),
        train=dict(steps=120_000, batch_size=32),
    ),
}

# https://github.com/lindermanlab/S5, bin/run_experiments; what does not decay there by
# intention, norms and biases, does not decay here.
S5 = {
    "listops": dict(
        model=dict(depth=8, features=128, gate="half_glu2"),
        layer_args=dict(state_size=16, blocks=8),
        optimizer=dict(lr=3e-3, weight_decay=0.04, warmup=-1_920),
        ssm_lr=1e-3,
        regular=("B", 1.0),
        train=dict(steps=76_800, batch_size=50),
    ),
}

# What a small run changes of these.
SMALL = {
    "listops": dict(
        model=dict(depth=4, features=64),
        optimizer=dict(lr=4e-3, warmup=-200),
        train=dict(steps=2_000, batch_size=32),
    ),
}


def get_config(arg="listops"):
    """`listops[,layer=NAME][,scale=small|paper]`, NAME s4, s4d, s5, another key of
    LAYER_ARGS or the dotted path of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", scale=SCALES)
    config = common.base()
    config.data.update(
        name=arg.task,
        folder=f"data/{arg.task}",  # gets what is generated
        path="",  # a folder with the LRA's own files, instead of generating
        seed=0,  # of the generated data, not of the run
        **DATA[arg.task][arg.scale],
    )
    config.model.norm = "batch"
    common.set_layer(config, arg.layer)
    config.optimizer.clip = 0.0
    recipe = (S5 if arg.layer == "s5" else S4)[arg.task]
    common.apply(config, dict(layer_args=dict(spectrum="legs", bidirectional=True)))
    common.apply(config, recipe)
    if arg.layer not in (*S4_LIKE, "s5"):  # another kind of state, so its own size
        common.set_layer(config, arg.layer)
    if arg.scale == "small":
        common.apply(config, SMALL[arg.task])
    names, decay = recipe["regular"]
    config.groups = [
        (rf".*/({names})", dict(lr=1.0, wd=decay, optional=True)),
        *common.groups(recipe["ssm_lr"] / config.optimizer.lr),
    ]
    steps = config.train.steps
    config.train.update(
        eval_every=steps // 20, log_every=steps // 200, checkpoint_every=steps // 20
    )
    return config
