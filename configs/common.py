"""What all configs share: every default, once, and the argument after the file name.

A config file has `get_config(arg)`, which takes `base()`, changes what its task needs
and returns plain data. `--config.optimizer.lr=1e-3` overrides one value; a name that
does not exist here fails.
"""

from ml_collections import ConfigDict

# The fields of each layer with their defaults, so that --config.model.layer_args.KEY
# can set them; tests hold them equal to the layers' own. A layer that is not here (a
# user's, by its dotted path) starts from its own defaults, and its class says what the
# flags are.
LAYER_ARGS = {
    "s4": dict(
        state_size=64,
        measure="legs",  # a key of ssm.hippo.LOW_RANK
        rank=1,
        transform="exp",  # exp, softplus, relu, sigmoid, none
        dt_min=1e-3,
        dt_max=1e-1,
        copies=0,
        step_scale=1.0,
        bidirectional=False,
    ),
    "dss": dict(
        state_size=64,
        variant="softmax",  # exp
        dt_min=1e-3,
        dt_max=1e-1,
        step_scale=1.0,
        bidirectional=False,
    ),
    "s4d": dict(
        state_size=64,
        spectrum="lin",  # lin, inv, inv2, quad, legs, real
        discretization="zoh",  # zoh, bilinear, dirac, async
        transform="exp",  # exp, softplus, relu, sigmoid, none
        dt_min=1e-3,
        dt_max=1e-1,
        copies=0,
        step_scale=1.0,
        bidirectional=False,
    ),
    "s5": dict(
        state_size=64,
        blocks=1,
        discretization="zoh",
        c_init="lecun_normal",  # trunc_standard_normal, complex_normal
        conj_sym=True,
        clip_eigs=False,
        dt_min=1e-3,
        dt_max=1e-1,
        step_scale=1.0,
        bidirectional=False,
    ),
    "lru": dict(state_size=64, r_min=0.0, r_max=1.0, max_phase=6.283185307179586),
    "mamba": dict(
        state_size=16,
        expand=2,
        conv_width=4,
        rank=0,  # features / 16
        dt_min=1e-3,
        dt_max=1e-1,
        dt_floor=1e-4,
    ),
    "mamba2": dict(
        state_size=64,
        head_size=0,  # 64, or all of a narrow layer
        groups=1,
        expand=2,
        conv_width=4,
        dt_min=1e-3,
        dt_max=1e-1,
        dt_floor=1e-4,
        dt_limit=(0.0, float("inf")),
    ),
    "rg_lru": dict(width=0, heads=1, conv_width=4, a_min=0.9, a_max=0.999),
    "retention": dict(heads=4, expand_k=1.0, expand_v=2.0, base=10_000.0),
    "lightning": dict(heads=4, expand_k=1.0, expand_v=1.0, slope_scale=1.0),
    "gla": dict(heads=4, expand_k=0.5, expand_v=1.0, rank=16, normaliser=16.0),
    "delta_net": dict(heads=4, expand_k=1.0, expand_v=1.0, conv_width=4),
    "gated_delta_net": dict(
        heads=4, expand_k=1.0, expand_v=2.0, conv_width=4, dt_min=1e-3, dt_max=1e-1
    ),
    "h3": dict(
        state_size=64,
        taps=64,
        head_size=1,
        spectrum="lin",  # a key of ssm.spectra.SPECTRA
        dt_min=1e-3,
        dt_max=1e-1,
    ),
    "hyena": dict(
        order=2,
        conv_width=3,
        hidden=64,
        inner=2,
        bands=1,
        frequency=1.0,
        fast=0.3,
        slow=1.5,
        target=0.01,
        shift=0.0,
    ),
    "long_conv": dict(
        start="random",  # double_exp
        squash=0.0,
        smooth=0,
        smooth_domain="time",  # frequency
        filter_dropout=0.0,
        bidirectional=False,
    ),
    "flash_butterfly": dict(
        start="random",  # double_exp
        squash=0.0,
        smooth=0,
        smooth_domain="time",  # frequency
        filter_dropout=0.0,
        bidirectional=False,
        order=0,
        per_feature=False,
    ),
    "sg_conv": dict(
        knots=64,
        layout="cat",  # sum
        decay="fixed",  # learned
        decay_min=2.0,
        decay_max=2.0,
        bidirectional=False,
    ),
    "attention": dict(
        heads=4,
        kv_heads=0,
        window=0,  # tokens of a sliding window
        rotary=1.0,
        base=10_000.0,
        bidirectional=False,
    ),
    "lstm": dict(),
    "gru": dict(),
    # over frames
    "conv_s5": dict(
        state_size=64,
        blocks=1,
        input_kernel=3,
        output_kernel=3,
        skip_kernel=3,
        output="resnet",  # linear, standard, diag_resnet, half_glu
        clip_eigs=True,
        dt_min=1e-3,
        dt_max=1e-1,
        chunk=16,
    ),
    "conv_lstm": dict(kernel_size=3),
    "frame_attention": dict(heads=4),
    "full_frame_attention": dict(heads=4),
}

# Patterns of parameter groups, see `groups`, and what a run calls them.
SSM = (
    r".*/(log_dt|log_step|A_re|A_im|P|Lambda_re|Lambda_im"
    r"|nu_log|theta_log|gamma_log|B)"
)
TAPS = r".*/(filter|[uk]_factor_\d+)"
SMALL = (
    r".*/(\w*bias|scale|D|A_log|Lambda|frequency|decay)"
    r"|.*/filter(_\d+)?/kernel"
)
ALL = r".*"
GROUP_NAMES = {
    SSM: "state space: eigenvalues, step size, B",
    TAPS: "taps of long convolutions",
    SMALL: "biases, scales, decays",
    ALL: "other weights",
    r".*/B": "state space: B",
    r".*/(B)": "state space: B",
    r".*/(log_dt|log_step)": "state space: step size",
}


def base() -> ConfigDict:
    """Every key that a run reads, with its default."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                # A name in layers.LAYERS, the dotted path of a class, or a tuple of
                # them: the pattern that the blocks repeat, see set_layer.
                layer="s4d",
                layer_args={},  # its fields, see LAYER_ARGS
                features=64,
                depth=4,
                encoder="",  # "" and 0: from the dataset
                vocab_size=0,
                length=0,
                outputs=0,
                grid="",  # of images: separable, axis_sum, cross; see `Grid`
                patch=1,  # pixels along each axis of a grid that become one place
                video=dict(
                    size=(0, 0),  # frames, channels and actions: from the dataset
                    channels=0,
                    actions=0,
                    # Channels at each resolution, half as large as that before.
                    depths=(64, 128, 256),
                    action_features=16,
                ),
                head="mean",  # mean, last, token, retrieval
                norm="layer",  # layer, batch, rms
                prenorm=True,
                gate="",  # none, glu, gelu, full_glu, half_glu1, half_glu2;
                mlp=-1.0,  # width of a gated MLP per feature, 0: none;
                gelu="",  # the form in the gate: erf, tanh
                norm_epsilon=-1.0,  # added to a variance; 0: Flax's of the norm;
                # "" and -1: as the layer's family has it, see its PLACEMENT
                dropout=0.0,
                tie_dropout=True,
                dtype="float32",
                # Recompute each block in the backward pass, but for
                remat=False,
                remat_keeps="loops",  # results of loops over time; dots, nothing
            ),
            data=dict(
                name="digits",
                workers=0,  # processes that prepare batches; 0: the main process
                # Batches of sequences of one length, another in each, of as many tokens
                # as batch_size of the longest (train.data.buckets).
                buckets=dict(
                    shortest=0,  # tokens, the longest halved some times; 0: one length
                    longest=0,  # 0: an example's
                    cut=False,  # documents into pieces, or each whole
                    # natural, uniform, grow_linear, grow_p2, shrink_linear, shrink_p2
                    curriculum="natural",
                    cycles=1,  # of the curriculum in an epoch
                ),
            ),
            optimizer=dict(
                lr=1e-3,
                weight_decay=0.05,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                schedule="cosine",  # cosine, constant, inverse_sqrt
                # Steps; of a negative number (a recipe's) as many, or a tenth of
                # train.steps where these are no more.
                warmup=0,
                floor=0.0,  # share of lr at the end of the cosine
                clip=1.0,  # global gradient norm; 0: no clipping
            ),
            groups=groups(),
            train=dict(
                steps=1000,
                batch_size=64,
                eval_batch_size=0,  # 0: batch_size
                eval_every=200,
                log_every=50,
                checkpoint_every=500,
                keep=2,  # checkpoints, besides the best
                save_timeout=3600.0,  # seconds a save may take; 0: any time
                init_from="",  # a workdir whose weights to start from
                label_smoothing=0.0,
                ema=0.0,  # decay of the averaged weights; 0: none
                accumulate=1,  # gradients averaged before one update
                # Steps in a row whose loss or gradient may be not finite: they change
                # nothing. 0: the first one ends the run.
                skip_nonfinite=0,
                # Tokens that are read at once, the state of those before cut from the
                # gradient; 0: all of a sequence.
                chunk=0,
                record=False,  # what goes on inside the layers, in every log
            ),
            # Self-pretraining: steps before those of train, on the task's own inputs.
            pretrain=dict(
                steps=0,  # 0: none
                objective="masked",  # next
                ratio=0.5,  # of the tokens that masked hides
                # Numbers are asked for by distance; or, where this is not 0, as one of
                # so many classes, equal steps from low to high.
                levels=0,
                low=0.0,
                high=1.0,
                lr=0.0,  # 0: optimizer.lr
                batch_size=0,  # 0: train.batch_size
                scratch=False,  # train the task from scratch too, to compare
            ),
            # Of a video model at the end of the run: clips to roll out; 0 frames: half
            # of a clip.
            rollout=dict(context=0, horizon=0, clips=64),
            # Devices, along each axis: rows of a batch are split over data and fsdp,
            # parameters and what the optimizer remembers over fsdp, heads and inner
            # features over tensor. -1: the devices that are left.
            mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),
        )
    )


def groups(ssm_lr: float = 0.25, filter_lr: float = 0.1) -> list:
    """Parameter groups for every layer; the first pattern that matches wins.

    lr and wd are factors of optimizer.lr and optimizer.weight_decay. The eigenvalues,
    the step size and B of a state-space model are sensitive: they learn at the rate
    `ssm_lr` and do not decay (https://arxiv.org/abs/2111.00396,
    https://arxiv.org/abs/2208.04933). So are the taps of a long convolution that are
    parameters themselves, and learned factors of its transform: they are small, and a
    step of Adam is as large as its rate (https://arxiv.org/abs/2302.06646).
    """
    return [
        (SSM, dict(lr=ssm_lr, wd=0.0, optional=True)),
        (TAPS, dict(lr=filter_lr, wd=0.0, optional=True)),
        (SMALL, dict(lr=1.0, wd=0.0)),
        (ALL, dict(lr=1.0, wd=1.0)),
    ]


def set_layer(config: ConfigDict, name: str) -> None:
    """Puts a layer and its fields into config.model: a name, or several joined by +,
    the pattern that the blocks repeat, with the fields of each under its name (of a
    user's own, under that of its class)."""
    names = tuple(name.split("+"))
    with config.ignore_type():
        config.model.layer = name if len(names) == 1 else names
    if len(names) == 1:
        config.model.layer_args = LAYER_ARGS.get(name, {})
    else:
        config.model.layer_args = {n: LAYER_ARGS[n] for n in names if n in LAYER_ARGS}


def apply(config: ConfigDict, recipe: dict) -> None:
    """Sets what a recipe says of the sections model, optimizer and train, and those of
    its layer_args that the config's layer has."""
    for section in ("model", "optimizer", "train"):
        config[section].update(recipe.get(section, {}))
    model = config.model
    single = isinstance(model.layer, str)
    for known in [model.layer_args] if single else model.layer_args.values():
        given = recipe.get("layer_args", {}).items()
        known.update({k: v for k, v in given if k in known})


def parse_arg(arg: str, **defaults) -> ConfigDict:
    """Parses what follows the colon in `--config pixels:digits,layer=s5`.

    Args:
        arg: words separated by commas: `name=value`, or a value alone, as first word
            and for the first name.
        **defaults: name -> default, whose type the values take. A tuple lists the
            choices of a name, its default first.

    Returns:
        The values by name.

    Raises:
        ValueError: an unknown name or choice, a name given twice, or a value of another
            type.
    """
    choices = {k: v for k, v in defaults.items() if isinstance(v, tuple)}
    values = {k: v[0] if k in choices else v for k, v in defaults.items()}
    given = set()
    for position, word in enumerate(arg.split(",") if arg else []):
        name, equals, text = word.partition("=")
        if not equals and position == 0:
            name, text = next(iter(defaults)), word
        if name not in defaults or (not equals and position) or name in given:
            reason = "is given twice" if name in given else "is not valid"
            raise ValueError(f"config argument {word!r} {reason}; {_usage(defaults)}")
        given.add(name)
        values[name] = _typed(name, text, values[name], choices.get(name))
    return ConfigDict(values)


def _typed(name, text, default, choices):
    types = {"true": True, "false": False} if isinstance(default, bool) else None
    try:
        value = types[text.lower()] if types else type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"config argument {name} must be of type {type(default).__name__}, "
            f"got {text!r}"
        ) from None
    if choices and value not in choices:
        raise ValueError(
            f"config argument {name} must be one of "
            f"{', '.join(map(str, choices))}, got {text!r}"
        )
    return value


def _usage(defaults) -> str:
    def value(default):
        return "|".join(map(str, default)) if isinstance(default, tuple) else default

    words = ", ".join(f"{name}={value(default)}" for name, default in defaults.items())
    return f"valid are {words}; the first may stand without its name"
