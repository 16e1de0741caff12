import functools
import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import arena
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, lra, pixels
from layers import FRAME_LAYERS, LAYERS, build
from layers.facts import placement_of
from layers.models import table
from layers.parameters import Alike
from train import data, losses, optimizers
from train.data import images, imdb, original

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem[0] != "_")
ARGUMENTS = [
    f"pixels:digits,layer={layer},target={target}"
    for layer in ("s4d", "s5", "lru", "gru")
    for target in ("label", "next")
]


def flag_values(spec, *overrides):
    """What the flags of `python -m train.main --config configs/...` make of it."""
    name, _, arg = spec.partition(":")
    argv = ["main", f"--config={CONFIGS / name}.py:{arg}", *overrides]
    values = flags.FlagValues()
    with mock.patch.object(sys, "argv", argv):  # where config_flags finds the overrides
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
    return values.config


LISTOPS = [
    pytest.param(
        f"lra:listops,layer={layer}",
        marks=[] if layer in ("s4", "s5", "mamba") else [pytest.mark.slow],
    )
    for layer in LAYERS
]
LISTOPS += [f"lra:listops,layer={layer},scale=paper" for layer in ("s4d", "s5")]
PATHFINDERS = [
    "lra:pathfinder16,layer=s5",
    "lra:pathfinder32,layer=attention,scale=paper,variant=lra",
    "lra:pathx,layer=s4,scale=paper",
    "lra:pathx,layer=s5,scale=paper",
]
IMAGES = ["lra:image,layer=s4d,scale=paper", "lra:image,layer=s5"]
IMAGES += [
    f"pixels:{task},layer={layer},scale={scale}"
    for task, layer, scale in (
        ("smnist", "s4d", "small"),
        ("pmnist", "s5", "paper"),
        ("scifar", "s4d", "paper"),
        ("scifar", "s5", "small"),
        ("scifar", "gru", "paper"),
    )
]


@pytest.mark.parametrize("spec", ARGUMENTS)
def test_config_fits_its_data_model_optimizer_and_loss(spec):
    config = flag_values(spec)
    check_fit(config, data.load(config.data))


@pytest.mark.parametrize("spec", LISTOPS)
def test_listops_config_fits(spec, tmp_path):
    config = flag_values(spec, f"--config.data.folder={tmp_path}")
    config.data.update(train=4, validation=2, test=2)
    check_fit(config, data.load(config.data))


@pytest.mark.parametrize("spec", PATHFINDERS)
def test_pathfinder_config_fits(spec, tmp_path):
    config = flag_values(spec, f"--config.data.folder={tmp_path}")
    config.data.update(train=4, validation=2, test=2)
    check_fit(config, data.load(config.data))


@pytest.mark.parametrize(
    "spec",
    [
        "lra:text,layer=s4d,scale=paper",
        "lra:text,layer=mamba,variant=lra",
        "lra:retrieval,layer=s5,scale=paper",
        "lra:retrieval,layer=attention",
    ],
)
def test_text_config_fits(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "EACH", 2)
    monkeypatch.setattr(imdb, "LEAST", 1)
    config = flag_values(spec, f"--config.data.folder={tmp_path}")
    if config.data.name == "imdb":
        arena.write_reviews(tmp_path)
        config.data.validation = config.data.validation and 0.5
    else:
        config.data.path = arena.write_pairs(tmp_path / "tsv_data")["path"]
    check_fit(config, data.load(config.data))


@pytest.mark.parametrize("spec", IMAGES)
def test_image_config_fits(spec):
    config = flag_values(spec)
    shape = (28, 28) if config.data.name == "mnist" else (32, 32, 3)
    images_and_labels = np.zeros((20, *shape), np.uint8), np.zeros(20, np.uint8)
    with (
        mock.patch.object(original, "locate", lambda *args: [None] * len(args[2])),
        mock.patch.object(images, "_read_mnist", lambda *_: images_and_labels * 2),
        mock.patch.object(original, "read_cifar", lambda *_: images_and_labels),
    ):
        check_fit(config, data.load(config.data))


def check_fit(config, dataset):
    model_config = config.model.copy_and_resolve_references()
    for key in ("encoder", "length", "vocab_size", "outputs"):
        model_config[key] = model_config[key] or getattr(dataset.spec, key)
    model_config.update(features=8, depth=1)
    model = build(model_config)
    batch = next(dataset.train(2, seed=0))

    def loss(key):
        variables = model.init({"params": key}, batch["inputs"])
        outputs, _ = model.apply(variables, batch["inputs"])
        losses_of = losses.make(dataset.spec.loss, config.train.label_smoothing)
        return variables["params"], losses_of(outputs, batch)

    params, (total, weight, metrics) = jax.eval_shape(loss, jax.random.key(0))
    assert total.shape == weight.shape == metrics["accuracy"].shape == ()
    _, groups, _ = optimizers.make(config, params)
    assert sum(map(len, groups.values())) == len(jax.tree.leaves(params))


def test_layer_args_are_the_fields_of_the_layers():
    layers = LAYERS | FRAME_LAYERS
    assert set(common.LAYER_ARGS) <= set(layers)
    for name, cls in layers.items():
        fields = table.fields(cls)
        assert not {"features", "dtype", "parent", "name"} & set(fields)
        assert common.LAYER_ARGS.get(name, {}) == fields, name
    config = flag_values("own:path=x", "--config.model.layer_args.spectrum=inv")
    assert config.model.layer_args.spectrum == "inv"


def test_a_pattern_of_layers_is_one_word():
    config = flag_values(
        "synthetic:induction,layer=mamba+mamba+attention",
        "--config.model.layer_args.mamba.state_size=4",
    )
    assert config.model.layer == ("mamba", "mamba", "attention")
    assert config.model.layer_args.mamba.state_size == 4
    config.model.update(encoder="token", vocab_size=9, outputs=9, depth=3)
    mamba, again, attention = build(config.model).stack().pattern
    assert mamba.keywords["mixer"]().state_size == 4
    assert mamba.keywords["mlp"] == again.keywords["mlp"] == 0
    mlp = round(config.model.features * placement_of(LAYERS["attention"]).mlp)
    assert attention.keywords["mlp"] == mlp > 0
    assert {b.keywords["gate"] for b in (mamba, attention)} == {"none"}


# Which group every parameter of every layer belongs to, by its name or by the one that
# its layer declares it to learn like: a new parameter has to be thought of, there.
SENSITIVE = {"A_re", "A_im", "B", "log_dt", "Lambda_re", "Lambda_im", "log_step"}
SENSITIVE |= {"nu_log", "theta_log", "gamma_log", "P"}
UNDECAYED = {"bias", "recurrent_bias", "scale", "D", "A_log", "dt_bias", "Lambda"}
UNDECAYED |= {"r_bias", "i_bias", "filter network", "frequency", "decay"}
TAPS = {"filter", *(f"{of}_factor_{i}" for of in "uk" for i in range(3))}
ORDINARY = {"kernel", "recurrent_kernel", "embedding", "C", "r_kernel", "i_kernel"}


@pytest.mark.parametrize(
    ("layer", "norm"), [("s4d", "batch"), *((layer, "layer") for layer in LAYERS)]
)
def test_every_parameter_is_in_the_group_meant_for_it(layer, norm):
    config = common.base()
    config.model.update(layer=layer, features=8, depth=1, norm=norm)
    config.model.update(encoder="token", vocab_size=3, outputs=2, length=4)
    model = build(config.model)
    tokens = np.zeros((1, 4), np.int32)
    init = functools.partial(model.init, {"params": jax.random.key(0)}, tokens)
    params = jax.eval_shape(init)["params"]
    _, groups, _ = optimizers.make(config, params)
    boxes = jax.tree.leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, Alike)
    )
    declared = {
        jax.tree_util.keystr(path, simple=True, separator="/"): box.like
        for path, box in boxes
        if isinstance(box, Alike)
    }
    for paths, names in zip(
        groups.values(), (SENSITIVE, TAPS, UNDECAYED, ORDINARY), strict=True
    ):
        found = {
            "filter network"
            if re.search(r"/filter(_\d+)?/", p)
            else declared.get(p, p.split("/")[-1])
            for p in paths
        }
        assert found <= names


def test_own_arrays_reach_the_dataset(tmp_path):
    path = tmp_path / "own.npz"
    rng = np.random.default_rng(0)
    np.savez(path, inputs=rng.normal(size=(40, 5, 2)), targets=np.arange(40) % 2)
    config = flag_values(
        f"own:path={path},layer=s5,head=last", "--config.data.test=0.5"
    )
    assert (config.model.layer, config.model.head) == ("s5", "last")
    dataset = data.load(config.data)
    assert dataset.num_examples("test") == 20 and dataset.spec.channels == 2
    config = flag_values(f"own:path={path},loss=regression")
    assert data.load(config.data).spec.loss == "regression"


def test_every_config_has_base_keys_and_says_how_to_run_it():
    base = common.base()
    for name in set(FILES) - {"common"}:
        spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        assert set(config) == set(base)
        for section in ("model", "optimizer", "train", "mesh"):
            assert set(config[section]) == set(base[section]), (name, section)
        assert f"python -m train.main --config {name}:" in module.__doc__
        assert "Hardware:" in module.__doc__


@pytest.mark.parametrize(
    "override", ["optimizer.warmpu=1", "data.targets=label", "sed=1", "model.dept=2"]
)
def test_misspelt_override_is_refused(override):
    with pytest.raises(
        (AttributeError, flags.Error, KeyError), match=r"(?i)did you mean"
    ):
        flag_values("pixels:digits", f"--config.{override}")


def test_override_keeps_the_type():
    config = flag_values(
        "pixels:digits", "--config.optimizer.lr=0.5", "--config.seed=3"
    )
    assert (config.optimizer.lr, config.seed) == (0.5, 3)
    with pytest.raises(flags.IllegalFlagValueError):
        flag_values("pixels:digits", "--config.train.steps=many")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("digits,target=all", "target must be one of label, next, got 'all'"),
        ("letters", "task must be one of digits, smnist, .*, got 'letters'"),
        ("digits,scale=paper", "scale must be small for digits"),
        ("smnist,target=next", "target must be label for smnist"),
        (
            "digits,layers=s5",
            "'layers=s5' is not valid; valid are task=.*layer=s4d, target=label.next",
        ),
        ("digits,s5", "'s5' is not valid"),
        ("digits,layer=s5,layer=lru", "'layer=lru' is given twice"),
        ("digits,", "'' is not valid"),
    ],
)
def test_bad_argument_is_named(arg, message):
    with pytest.raises(ValueError, match=message):
        pixels.get_config(arg)
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        flag_values(f"pixels:{arg}")


def group_of(config, path):
    """(lr, wd) of the parameter `path`, in absolute numbers."""
    pattern = next(p for p, _ in config.groups if re.fullmatch(p, path))
    factors = dict(config.groups)[pattern]
    optimizer = config.optimizer
    return factors["lr"] * optimizer.lr, factors["wd"] * optimizer.weight_decay


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (
            lra.get_config("listops,layer=s4,scale=paper"),
            {
                "A_re": (1e-3, 0),
                "B": (1e-3, 0),
                "log_dt": (1e-2, 0),
                "C": (1e-2, 0.05),
            },
        ),
        (
            lra.get_config("listops,layer=s5,scale=paper"),
            {
                "Lambda_re": (1e-3, 0),
                "log_step": (1e-3, 0),
                "B": (3e-3, 0.04),
                "D": (3e-3, 0),
            },
        ),
        (
            lra.get_config("listops,layer=s4d,scale=small"),
            {"A_im": (1e-3, 0), "log_dt": (4e-3, 0), "kernel": (4e-3, 0.05)},
        ),
        (
            lra.get_config("pathx,layer=s4,scale=paper"),
            {"A_re": (1e-3, 0), "log_dt": (1e-3, 0), "C": (1e-3, 0.05)},
        ),
        (
            lra.get_config("pathx,layer=s5,scale=paper"),
            {"B": (6e-4, 0.06), "log_step": (6e-4, 0), "kernel": (1.8e-3, 0.06)},
        ),
        (
            lra.get_config("pathfinder64,layer=s5,scale=paper"),
            {"B": (9e-4, 0), "Lambda_re": (9e-4, 0), "kernel": (4.5e-3, 0.03)},
        ),
        (
            pixels.get_config("scifar,layer=s5,scale=paper"),
            {"Lambda_im": (1e-3, 0), "B": (4.5e-3, 0.07), "kernel": (4.5e-3, 0.07)},
        ),
        (
            pixels.get_config("smnist,layer=s5,scale=paper"),
            {"B": (2e-3, 0), "log_step": (2e-3, 0), "kernel": (8e-3, 0.01)},
        ),
        (
            pixels.get_config("scifar,layer=s4,scale=paper"),
            {"B": (1e-3, 0), "log_dt": (1e-3, 0), "kernel": (1e-2, 0.05)},
        ),
    ],
)
def test_published_learning_rates_reach_their_parameters(config, rates):
    for name, expected in rates.items():
        found = group_of(config, f"stack/block_0/mixer/{name}")
        np.testing.assert_allclose(found, expected, err_msg=name)


def test_arguments_take_the_type_of_their_default():
    arg = common.parse_arg(
        "x=y,n=3,rate=0.5,fast=true", x="", n=1, rate=1.0, fast=False
    )
    assert arg.to_dict() == {"x": "y", "n": 3, "rate": 0.5, "fast": True}
    with pytest.raises(ValueError, match=r"n must be of type int, got '1.5'"):
        common.parse_arg("n=1.5", n=1)
    with pytest.raises(ValueError, match=r"fast must be of type bool, got 'maybe'"):
        common.parse_arg("fast=maybe", fast=False)
    assert common.parse_arg("path=a=b", path="").path == "a=b"


def test_every_call_of_base_is_independent():
    first = common.base()
    first.groups.append(("x", {}))
    first.groups[0][1]["lr"] = 9.0
    first.model.depth = 99
    second = common.base()
    assert second.model.depth != 99 and len(second.groups) == len(first.groups) - 1
    assert second.groups[0][1]["lr"] != 9.0


def test_the_transformer_of_self_pretraining():
    """Of the arena's size, with rotary positions, in both directions."""
    config = lra.get_config("text,layer=attention,scale=paper")
    model, optimizer = config.model, config.optimizer
    assert (model.depth, model.features, model.norm) == (6, 512, "layer")
    assert model.mlp * 3 == 4 * 2  # as many parameters as four times the width, ungated
    assert model.layer_args.heads == 8 and model.layer_args.rotary == 1.0
    assert model.layer_args.bidirectional
    assert (optimizer.lr, optimizer.weight_decay) == (5e-4, 0.1)
    assert (optimizer.schedule, optimizer.warmup) == ("constant", -2000)
    assert (config.pretrain.lr, config.pretrain.ratio) == (5e-4, 0.15)
    assert config.train.steps == 50_000


def test_layers_without_settings_of_their_own_read_in_both_directions_too():
    config = lra.get_config("pathfinder32,layer=long_conv,scale=paper")
    assert config.model.layer_args.bidirectional
    assert "bidirectional" not in lra.get_config("text,layer=mamba").model.layer_args
