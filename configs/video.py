"""Video: the next frame from those before, and open-loop rollouts.

Trains: moving_digits: digits that fly through a square and bounce off its walls, drawn
    on the fly from scikit-learn's images (no download; scale=paper: of MNIST's training
    images, whose files lie in data.folder, data.download=True fetches them). clips: the
    NPZ file data.path of your own. frames: a folder data.folder of your own, one folder
    of images per video. stage=codes reads what `train.video.codec` has made of
    one of these; stage=autoencoder trains what makes them.
    scale=small: 20 frames of 32x32 to train on; rollouts of 10 frames of context and 30
    after it. scale=paper: 300 frames of 64x64, 100 of context, 800 after it.
Hardware: small: a laptop's CPU (2 cores). paper: one GPU of 80 GB.
Time and score: small: a quarter of an hour; the table in docs/results.md, by `python -m
    train.reproduce --task moving_digits`; no paper reports it. paper: SSIM 0.761 over
    the 800 frames after 100 of context (https://arxiv.org/abs/2310.19694), the "mean"
    of rollout.json; 300,000 steps.

    python -m train.main --config video:moving_digits,scale=small
    python -m train.main --config video:moving_digits,layer=conv_lstm
    python -m train.main --config video:clips,path=my.npz --workdir runs/my
"""

from configs import common

TASKS = ("moving_digits", "clips", "frames")
STAGES = ("pixels", "autoencoder", "codes")
SCALES = ("small", "paper")


def get_config(arg="moving_digits"):
    """`TASK[,layer=NAME][,scale=small|paper][,stage=pixels|autoencoder|codes]
    [,path=FILE|FOLDER]`; NAME conv_s5, conv_lstm, frame_attention or the dotted path of
    a layer over frames. stage=codes takes an NPZ of codes, whatever the task."""
    arg = common.parse_arg(
        arg, task=TASKS, layer="conv_s5", scale=SCALES, stage=STAGES, path=""
    )
    if arg.task != "moving_digits" and arg.scale == "paper":
        raise ValueError(f"config argument scale must be small for {arg.task}")
    config = common.base()
    common.set_layer(config, arg.layer)
    _data(config, arg)
    config.model.video.depths = (8, 16, 32)
    config.model.update(depth=3, features=32, head="token", prenorm=False, gate="none")
    config.optimizer.update(lr=2e-3, weight_decay=1e-5, b2=0.95, warmup=-100)
    # Every parameter learns alike, those of the state-space model too.
    config.groups = [(r".*", dict(lr=1.0, wd=1.0))]
    config.train.update(steps=1500, batch_size=8, eval_every=500, log_every=50)
    config.rollout.update(context=10, horizon=30)
    if arg.task != "moving_digits" or arg.stage == "codes":
        config.rollout.update(context=0, horizon=0)  # half of a clip each
    if arg.scale == "paper":
        _paper(config, arg)
    if arg.stage == "codes":
        config.model.video.depths = (32,)  # they are small as they are
        config.train.label_smoothing = 0.01
    if arg.stage == "autoencoder":
        _autoencoder(config)
    return config


def _data(config, arg):
    data = config.data
    # Of the user's own videos, where they do not say themselves what is for what.
    division = dict(validation=0.1, test=0.1, seed=0)
    if arg.stage == "codes":
        # codec: the workdir of the autoencoder, which shows codes as pixels.
        data.update(name="clips", path=arg.path, length=0, vocab_size=0, codec="")
        data.update(division, actions=0)
    elif arg.task == "clips":
        data.update(division, name="clips", path=arg.path, length=0, actions=0)
    elif arg.task == "frames":
        data.update(division, name="frames", folder=arg.path, length=20)
        data.update(size=(), channels=3)
    elif arg.path:
        raise ValueError("config argument path must be empty for moving_digits")
    else:
        data.update(name="moving_digits", length=20, side=32, digit_side=14)
        data.update(source="digits", folder="data/mnist", download=False)
        data.update(validation=64, test=256)


def _paper(config, arg):
    """https://arxiv.org/abs/2310.19694, its code's settings for 300 frames."""
    if arg.stage != "codes":  # whose clips are what the file has
        config.data.update(length=300, side=64, digit_side=28, source="mnist")
        config.data.update(validation=64, test=1024)
        config.rollout.update(context=100, horizon=800, clips=1024)
    config.model.update(depth=8, features=256, remat=True)
    if "state_size" in config.model.layer_args:
        config.model.layer_args.state_size = 256
    config.model.video.depths = (64, 128, 256)
    lr = 5e-4 if arg.layer == "conv_lstm" else 1e-3
    config.optimizer.update(lr=lr, warmup=-5_000)
    config.train.update(steps=300_000, eval_every=10_000, log_every=100)
    config.train.checkpoint_every = 10_000


def _autoencoder(config):
    common.set_layer(config, "vq")
    config.model.layer_args = dict(
        depths=(32, 64),  # channels after every halving
        codes=64,
        code_features=16,
        blocks=1,
        beta=0.25,
        decay=0.99,
        restart=1.0,
    )
    config.data.update(length=10, reconstruct=True)
    config.train.update(steps=1500, batch_size=4, eval_every=500, log_every=100)
