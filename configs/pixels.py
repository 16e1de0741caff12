"""Images read pixel by pixel: handwritten digits, 64 pixels of 17 grey levels.

Trains: 1,293 images of 8x8 pixels from scikit-learn's own data (no download); 144 choose
    the best step, 360 are the test.
Hardware: a laptop's CPU (2 cores).
"""

from configs import common

TASKS = ("digits",)
LAYERS = ("s4d", "s5", "lru", "gru")


def get_config(arg="digits"):
    """`digits[,layer=s4d|s5|lru|gru][,target=label|next]`."""
    arg = common.parse_arg(arg, task=TASKS, layer=LAYERS, target=("label", "next"))
    config = common.base()
    config.model.layer = arg.layer
    config.data.name = arg.task
    config.data.target = arg.target
    config.data.augment = "none"
    if arg.target == "next":
        config.model.head = "token"
    return config
