"""Images read pixel by pixel: handwritten digits, 64 pixels of 17 grey levels.

Trains: 1,293 images of 8x8 pixels from scikit-learn's own data (no download), shifted
    by up to one pixel; 144 choose the best step, 360 are the test. `target=label` names
    the digit after the last pixel, `target=next` predicts each pixel from those before.
Hardware: a laptop's CPU (2 cores).
Time and score: the table in README.md, by `python -m train.reproduce`; no paper reports
    this split.

    python -m train.main --config configs/pixels.py:digits,layer=s5
"""

from configs import common

TASKS = ("digits",)
TARGETS = ("label", "next")


def get_config(arg="digits"):
    """`digits[,layer=NAME][,target=label|next]`, NAME s4d, s5, lru, gru or the dotted
    path of a class."""
    arg = common.parse_arg(arg, task=TASKS, layer="s4d", target=TARGETS)
    config = common.base()
    config.model.layer = arg.layer
    config.model.layer_args = common.LAYER_ARGS.get(arg.layer, {})
    config.model.head = "token" if arg.target == "next" else "mean"
    config.data.update(
        name=arg.task,
        target=arg.target,
        augment="shift",  # none, shift, affine
    )
    config.model.dropout = 0.1
    config.optimizer.lr = 4e-3
    config.train.update(steps=1200, eval_every=200, log_every=100, ema=0.99)
    return config
