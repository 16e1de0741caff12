"""Your own sequences: a file, a folder of recordings, or a function of your own.

Trains: whatever there is; `train/data/arrays.py` describes the layout of an NPZ
    (inputs, targets and optionally mask or lengths, reset, dt, split, class_names), of
    a CSV or Parquet file (one sequence per row) and of a folder of labelled WAV files.
    Every fault of a file is reported by its key, its row and column, or its name.
Hardware: a CPU will do for some thousand sequences of some hundred tokens.
Time and score: as the data have it.

    python -m train.main --config own:path=my.npz,layer=s5 --workdir runs/my
    python -m train.main --config own:path=recordings/ --config.data.rate=2000
        --config.data.length=1280
    python -m train.main --config own:name=my_package.load,count=1000
"""

from configs import common


def get_config(arg=""):
    """`path=PLACE[,layer=NAME][,head=mean|last|token][,loss=...]`.

    head: mean or last for one target per sequence, token for one per token.
    loss: auto (by the targets' dtype), classification, token or regression.
    A path with a comma in it goes to --config.data.path.

    Or `name=PACKAGE.FUNCTION[,layer=NAME][,head=...][,KEY=VALUE]...`, a function that
    returns a `train.data.pipeline.Dataset`, and its arguments.
    """
    name, arg, settings = _function(arg)
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
    # With 1e-3 a trial of some hundred steps learns nothing; docs/results.md has more.
    config.optimizer.update(lr=1e-2, warmup=-100)
    if name:
        config.data.update(name=name, **settings)
        return config
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
        normalise=True,  # numbers: mean 0 and std 1 per channel of the training part
        # Of a folder of recordings:
        rate=0,  # samples per second that all are resampled to; 0: what they have
        length=0,  # samples that are taken of each; 0: all of the longest
        label="",  # folder, name (up to the first _ or -); "": folder if there is one
    )
    return config


def _function(arg):
    """The dotted path after `name=`, what of `arg` is the config's, and the rest, the
    function's arguments."""
    words = arg.split(",")
    pairs = [word.partition("=") for word in words]
    if "name" not in [key for key, _, _ in pairs]:
        return "", arg, {}
    own = [word for word in words if word.partition("=")[0] in ("layer", "head")]
    given = {k: _value(v) for k, _, v in pairs if k not in ("layer", "head")}
    return given.pop("name"), ",".join(own), given


def _value(text):
    """A whole number, a number, True or False where the text is one."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
