"""Synthetic recall: small models, exact questions, data drawn on the fly.

Trains: mqar, the values that stood beside K keys; selective_copying, K tokens scattered
    over a sequence, repeated at its end; copying, the same from its beginning;
    induction, the token that followed the trigger before; passkey, a number hidden in a
    text, byte by byte. `train/data/synthetic.py` defines each.
    scale=small: 2 x 48 over 64 tokens (mqar 32, passkey 256). scale=paper: published
    sizes and settings, for copying and passkey those of selective copying.
Hardware: small: a laptop's CPU (2 cores). paper: one GPU of 16 GB or more.
Time: small: one to two minutes, compilation included. paper: hours.
Score: paper, test accuracy: selective_copying: S4 18.3, Mamba 99.8; induction at 2 and
    4 times the training length: Mamba 100, Hyena 100 and 44.1, attention with rotary
    positions 83.6 at 2 times (https://arxiv.org/abs/2312.00752). mqar: attention
    100, recurrent layers the more the larger their state
    (https://arxiv.org/abs/2312.04927, https://arxiv.org/abs/2402.18668). small: the
    tables in docs/results.md, `python -m train.reproduce --task induction`; guessing
    gets 0.07 of induction and copying, 0.25 of mqar (one of its values), 0.1 of
    passkey.

    python -m train.main --config synthetic:induction,layer=mamba
    python -m train.main --config synthetic:induction --lengths 1,2,4,8
"""

from configs import common

TASKS = ("mqar", "selective_copying", "copying", "induction", "passkey")
SCALES = ("small", "paper")

# Training examples of an epoch, more than a run reads, unless a paper repeats them.
FRESH = dict(train=100_000_000, validation=1_000, test=1_000)

DATA = {
    "mqar": dict(
        small=dict(length=32, vocab_size=32, pairs=4, **FRESH),
        paper=dict(
            length=512,
            vocab_size=8_192,
            pairs=64,
            train=100_000,
            validation=1_000,
            test=3_000,
        ),
    ),
    "selective_copying": dict(
        small=dict(length=64, vocab_size=16, tokens=8, **FRESH),
        paper=dict(length=4_096, vocab_size=16, tokens=16, **FRESH),
    ),
    "copying": dict(
        small=dict(length=64, vocab_size=16, tokens=8, **FRESH),
        paper=dict(length=4_096, vocab_size=16, tokens=16, **FRESH),
    ),
    "induction": dict(
        small=dict(length=64, vocab_size=16, **FRESH),
        paper=dict(length=256, vocab_size=16, **FRESH),
    ),
    "passkey": dict(
        small=dict(length=256, digits=5, **FRESH),
        paper=dict(length=4_096, digits=5, **FRESH),
    ),
}
MORE = {"mqar": dict(power=0.01, random_filler=False)}

# What a layer with a capacity (filters, caches) holds, in training lengths: as long as
# the task is tested.
LONGEST = {
    "mqar": 1,
    "selective_copying": 8,
    "copying": 8,
    "induction": 8,
    "passkey": 8,
}

# https://arxiv.org/abs/2312.00752, appendix E.1
SELECTIVE = dict(
    model=dict(depth=2, features=64),
    optimizer=dict(lr=1e-4, weight_decay=0.0, schedule="constant"),
    train=dict(steps=400_000, batch_size=64),
)
PAPER = {
    # https://github.com/HazyResearch/zoology, iclr24_zoology_figure2: 64 epochs; the
    # best of four rates per model, of which this is the third
    "mqar": dict(
        model=dict(depth=2, features=128, mlp=0.0),
        optimizer=dict(lr=2.2e-3, weight_decay=0.1),
        train=dict(steps=50_000, batch_size=128),
    ),
    "selective_copying": SELECTIVE,
    "copying": SELECTIVE,
    # https://arxiv.org/abs/2312.00752, appendix E.1
    "induction": dict(
        model=dict(depth=2, features=64),
        optimizer=dict(lr=1e-3, weight_decay=0.0, schedule="constant"),
        train=dict(steps=204_800, batch_size=8),
    ),
    "passkey": SELECTIVE,
}

# What a small run changes of these, besides width and learning rate.
SMALL = {
    "mqar": dict(steps=1_500, batch_size=64),
    "selective_copying": dict(steps=2_000, batch_size=32),
    "copying": dict(steps=1_000, batch_size=32),
    "induction": dict(steps=1_000, batch_size=32),
    "passkey": dict(steps=2_000, batch_size=16),
}


def get_config(arg="mqar"):
    """`mqar|selective_copying|copying|induction|passkey[,layer=NAME]
    [,scale=small|paper]`, NAME a key of LAYER_ARGS, several joined by + or the dotted
    path of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", scale=SCALES)
    config = common.base()
    config.data.update(name=arg.task, seed=0)  # of the data, not of the run
    config.data.update({**MORE.get(arg.task, {}), **DATA[arg.task][arg.scale]})
    common.set_layer(config, arg.layer)
    config.model.update(head="token", length=LONGEST[arg.task] * config.data.length)
    common.apply(config, PAPER[arg.task])
    if arg.scale == "small":
        train = SMALL[arg.task]
        warmup = -(train["steps"] // 10)
        small = dict(
            model=dict(features=48),
            optimizer=dict(lr=3e-3, schedule="cosine", warmup=warmup),
            train=train,
        )
        common.apply(config, small)
    steps = config.train.steps
    config.train.update(
        eval_every=steps // 10, log_every=steps // 20, checkpoint_every=steps // 5
    )
    return config
