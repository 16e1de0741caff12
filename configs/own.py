"""Your own sequences, from one NPZ or CSV file.

Trains: whatever the file holds; `train/data/arrays.py` describes its layout (inputs,
    targets and optionally mask or lengths, reset, dt, split), and every fault of the
    file is reported by its key, or its row and column.
Hardware: a CPU will do for some thousand sequences of some hundred tokens.
Time and score: as the data have it.

    python -m train.main --config own:path=my.npz,layer=s5 --workdir runs/my
"""

from configs import common


def get_config(arg=""):
    """`path=FILE[,layer=NAME][,head=mean|last|token][,loss=...]`.

    head: mean or last for one target per sequence, token for one per token.
    loss: auto (by the targets' dtype), classification, token or regression.
    A path with a comma in it goes to --config.data.path.
    """
    arg = common.parse_arg(
        arg,
        path="",
        layer="s4d",
        head=("mean", "last", "token"),
        loss=("auto", "classification", "token", "regression"),
    )
    config = common.base()
    common.set_layer(config, arg.layer)
    config.model.head = arg.head
    config.data.update(
        name="arrays",
        path=arg.path,
        encoder="",  # scalar, token; "": integers of an NPZ are tokens
        loss="" if arg.loss == "auto" else arg.loss,
        vocab_size=0,  # 0: the largest token plus 1
        outputs=0,  # 0: the largest class plus 1
        validation=0.1,  # of what is left after the test part
        test=0.1,
        seed=0,  # of the division, not of the run
    )
    return config
