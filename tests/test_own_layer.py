"""A layer of the user's own: found, asked what it must have, proved, trained."""

import json
import re
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_run
from absl import flags

from configs import common, pixels
from layers import GRU, contract, laws
from layers.facts import has_state, why_no_state
from layers.laws import __main__ as laws_command
from layers.models.build import build, get
from train import endings, evaluate, main, probe, records, resolve, runs, sharding
from train.reproduce import __main__ as reproduce
from train.reproduce import contest

MODULE = """
import flax.linen as nn
import jax.numpy as jnp

from layers import GRU, S5


class Slow(S5):
    state_size: int = 4


class Whole(GRU):
    width: int | None = None
    names: tuple = ("a",)


class WithoutDtype(nn.Module):
    features: int
    dtype = jnp.float32

    def __call__(self, x, state=None, sequence=None, train=False):
        return x, state

    @nn.nowrap
    def init_state(self, batch_size):
        return None


class WithoutFeatures(nn.Module):
    dtype: jnp.dtype = jnp.float32

    __call__, init_state = WithoutDtype.__call__, WithoutDtype.init_state


class WithoutState(nn.Module):
    features: int
    dtype: jnp.dtype = jnp.float32

    __call__ = WithoutDtype.__call__


class WithoutCall(nn.Module):
    features: int
    dtype: jnp.dtype = jnp.float32

    init_state = WithoutDtype.init_state


class ShortCall(GRU):
    def __call__(self, x):
        return x, None


class OtherCall(GRU):
    def __call__(self, x, carry=None, sequence=None, train=False):
        return x, carry


class ShortState(GRU):
    def init_state(self):
        return None


class OnlyOutput(GRU):
    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return x


class Narrow(GRU):
    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return x[..., :1], state


class Stateless(nn.Module):
    features: int
    dtype: jnp.dtype = jnp.float32

    __call__ = WithoutDtype.__call__

    def init_state(self, batch_size):
        raise ValueError("init_state: there is none")


class Declared(Stateless):
    REFUSES = ("dt", "state")


def function(x):
    return x


class Plain:
    pass
"""

MODEL = dict(encoder="scalar", length=8, outputs=3, features=6, depth=2)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder on Python's path with the module `mine` and the package `parcel`."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "parcel").mkdir()
    (tmp_path / "parcel" / "__init__.py").write_text("")
    (tmp_path / "parcel" / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "parcel" / "wrong.py").write_text("import jax\njax.no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n in ("mine", "leaky", "parcel")]:
        del sys.modules[name]
    for name in [n for n in sys.modules if n.startswith("parcel.")]:
        del sys.modules[name]


def built(layer, **args):
    model = common.base().model.to_dict() | MODEL
    return build({**model, "layer": layer, "layer_args": args})


LACKS = "must have features, dtype, __call__ and init_state; it lacks "
FOUND = {
    "mine.WithoutDtype": LACKS
    + "the field `dtype: jnp.dtype = jnp.float32`, which has "
    "no annotation and so is no field",
    "mine.WithoutFeatures": LACKS + "the field `features: int`",
    "mine.WithoutState": LACKS + "the method `init_state(self, batch_size)`",
    "mine.WithoutCall": LACKS + "the method `__call__(self, x, state=None, sequence=No",
    "mine.ShortCall": "must take `__call__(self, x, state=None, sequence=None, "
    "train=False)`, got `__call__(self, x)`",
    "mine.OtherCall": "got `__call__(self, x, carry=None, sequence=None, train=False)`",
    "mine.ShortState": "`init_state(self, batch_size)`, got `init_state(self)`",
    "mine.function": "a class of flax.linen.Module, got a function that is none",
    "mine.Plain": "must be a class of flax.linen.Module, got a class that is none",
    "mine.Nothing": "mine.py), which has Slow, Whole, WithoutDtype, ",
    "mine.Slow.Inner": "mine.py) is a module and no package, so 'mine.Slow.Inner'",
    "parcel.nothing.Layer": "there is no module 'parcel.nothing' for 'parcel.nothing",
    "layers.mine.Layer": f"layers is the package in {tiny_run.ROOT / 'layers'}",
    "nowhere.Layer": "there is no module 'nowhere' for 'nowhere.Layer'; Python looked",
    "nowhere..Layer": "or the dotted path of a Flax module, got 'nowhere..Layer'",
}


@pytest.mark.parametrize("name", FOUND)
def test_laws_and_trainer_say_the_same_of_what_is_no_layer(own, name, capsys):
    with pytest.raises(ValueError) as trainer:
        built(name)
    said = str(trainer.value)
    assert said.startswith("layer: ") and FOUND[name] in said and "\n" not in said
    with pytest.raises(SystemExit, match="2"):
        laws_command.main(["--layer", name])
    assert said in capsys.readouterr().err


def test_where_python_looked_is_named(own, monkeypatch):
    with pytest.raises(ValueError) as found:
        get("nowhere.Layer")
    assert f"looked in {own}, " in str(found.value)
    folder = own / "parcel"
    monkeypatch.chdir(folder)  # of a script, the current folder is on no path
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with pytest.raises(ValueError) as found:
        get("nowhere.Layer")
    assert f"the current folder, {folder}, is not among them" in str(found.value)
    assert "site-packages" not in str(found.value)


def test_what_a_users_module_raises_is_the_users_to_see(own):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        get("parcel.broken.Layer")
    with pytest.raises(AttributeError, match="no_such_name"):
        get("parcel.wrong.Layer")


def test_a_state_that_is_missing_is_declared(own):
    message = r"layer: init_state of mine.Stateless must .* REFUSES = .* there is none"
    with pytest.raises(ValueError, match=message):
        built("mine.Stateless")
    model = built("mine.Declared")
    assert not has_state(model)
    assert why_no_state(model) == "init_state: there is none"


class Batches:
    """The data set of one batch."""

    sources = ("test",)

    def num_examples(self, split):
        return 1

    def evaluation(self, split, size):
        yield {"inputs": np.ones((size, 8), "f"), "mask": np.ones((size, 8), bool)}


def test_a_state_that_cannot_be_made_is_no_missing_one(monkeypatch):
    """Neither at the end of a run, nor in an evaluation, nor in the report."""
    model, batch = built("gru"), next(Batches().evaluation("test", 1))
    variables = jax.jit(model.init)(jax.random.key(0), batch["inputs"])

    def broken(self, batch_size):
        raise ValueError("init_state: out of order")

    monkeypatch.setattr(GRU, "init_state", broken)
    mesh = sharding.make_mesh(common.base())
    parts = types.SimpleNamespace(model=model, dataset=Batches(), mesh=mesh)
    with pytest.raises(ValueError, match="init_state: out of order"):
        endings.compare(common.base(), parts, variables)
    with pytest.raises(ValueError, match="init_state: out of order"):
        evaluate.compare_modes(model, variables, batch)
    variables = jax.tree.map(np.asarray, nn.unbox(variables))
    with pytest.raises(ValueError, match="init_state: out of order"):
        probe.blocks(model, {"now": variables}, 8)
    resolve.check_causal(model)


def test_why_there_is_no_state_may_be_of_any_kind():
    """What a declared `init_state` raises ends no run."""

    class Raising(GRU):
        REFUSES = ("dt", "state")

        def init_state(self, batch_size):
            raise NotImplementedError

    class Unsaid(GRU):
        def init_state(self, batch_size):
            raise NotImplementedError("later")

    assert "no recurrent mode" in why_no_state(Raising(4))
    with pytest.raises(ValueError, match=r"init_state of Unsaid must .*Error: later"):
        contract.check_init_state(Unsaid(4))


@pytest.mark.parametrize("name", ["mine.OnlyOutput", "mine.Narrow"])
def test_a_call_returns_its_output_and_a_state(own, name):
    """Two rows would be taken for both, and trained on."""
    with pytest.raises(
        ValueError, match=r"must return y, of the shape of x, .* got"
    ) as a:
        built(name)
    with pytest.raises(ValueError) as b:
        laws.examine(get(name)(4), only=["rows"])
    ending = str(a.value).partition("must return")[2].partition("(2,")[0]
    assert ending in str(b.value)


@pytest.mark.parametrize(
    ("layer", "args", "message"),
    [
        (
            "mine.Slow",
            dict(state_size="x"),
            "must be a whole number for mine.Slow, got",
        ),
        (
            "mine.Slow",
            dict(state_size=True),
            "must be a whole number for mine.Slow, got",
        ),
        ("mine.Slow", dict(clip_eigs=1), "must be True or False for mine.Slow, got 1"),
        ("mine.Slow", dict(dt_min="x"), r"layer_args.dt_min: must be a number for"),
        (
            "mine.Slow",
            dict(stat=1),
            r"must be among \['bidirectional', .* got \['stat'\]",
        ),
        ("mine.Whole", dict(width="x"), "layer_args.width: must be a whole number for"),
        ("mine.Whole", dict(names="x"), "layer_args.names: must be a sequence for"),
    ],
)
def test_fields_of_another_kind_are_named(own, layer, args, message):
    with pytest.raises(ValueError, match=message):
        built(layer, **args)


def test_a_field_without_a_default_must_be_given(own, capsys):
    two = (
        "features: int\n    dtype = jnp",
        "features: int\n    n: int\n    dtype: jnp.dtype = jnp",
    )
    (own / "needy.py").write_text(MODULE.replace(*two))
    with pytest.raises(ValueError, match=r"layer_args: must have \['n'\], of which"):
        built("needy.WithoutDtype")
    assert mixer(built("needy.WithoutDtype", n=3)).n == 3
    with pytest.raises(SystemExit, match="2"):
        laws_command.main(["--layer", "needy.WithoutDtype"])
    assert "EXAMPLES: must have ['n'], of which" in capsys.readouterr().err
    del sys.modules["needy"]


def mixer(model):
    return model.stack().pattern[0]().mixer()


def test_a_list_of_a_config_file_is_a_tuple(own):
    assert mixer(built("mine.Whole", names=["b", "c"])).names == ("b", "c")


@pytest.fixture
def parsed(monkeypatch):
    """The config of the flags of `train.main`, in this process."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.main", *arguments])
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # of an earlier call
        for name in ("workdir", "seeds", "lengths", "report", "config", "certificate"):
            flags.FLAGS[name].unparse()
        main._parse(sys.argv)
        return main.CONFIG.value

    yield parse
    flags.FLAGS.unparse_flags()


def test_flags_set_the_fields_of_a_layer_of_ones_own(own, parsed):
    start = "--config=pixels:digits,layer=mine."
    assert parsed(f"{start}Slow").model.layer_args.to_dict() == {}
    args = "--config.model.layer_args."
    config = parsed(f"{start}Slow", f"{args}state_size=6")
    # The others stay the class's own, as without any flag.
    assert config.model.layer_args.to_dict() == {"state_size": 6}
    config = parsed(f"{start}Slow", f"{args}state_size=6", f"{args}conj_sym=false")
    assert config.model.layer_args.to_dict() == {"state_size": 6, "conj_sym": False}
    config = parsed(f"{start}Whole", f"{args}width=3")
    assert config.model.layer_args.to_dict() == {"width": 3}
    config = parsed(f"{start}Slow+gru", f"{args}Slow.state_size=6")
    assert config.model.layer_args.to_dict() == {"Slow": {"state_size": 6}, "gru": {}}
    model = config.model.to_dict() | MODEL
    assert mixer(build(model)).state_size == 6


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("state_size=x", "layer_args.state_size=x: invalid literal for int"),
        ("stat=3", r"config.model.layer_args has no 'stat'; it has .*state_size"),
        ("dtype=x", r"config.model.layer_args has no 'dtype'; it has .*state_size"),
    ],
)
def test_a_flag_that_cannot_be_is_named(own, parsed, flag, message):
    with pytest.raises((ValueError, flags.Error), match=message):
        parsed(
            "--config=pixels:digits,layer=mine.Slow",
            f"--config.model.layer_args.{flag}",
        )


def test_a_layer_that_is_not_found_is_one_line_of_the_flags_too(parsed):
    with pytest.raises((ValueError, flags.Error), match="there is no module 'nowhere'"):
        parsed(
            "--config=pixels:digits,layer=nowhere.X", "--config.model.layer_args.a=3"
        )


# The example of CONTRIBUTING.md, as it stands.


@pytest.fixture
def leaky(own):
    """The name of its class, in a file of the name that the text gives it."""
    text = (tiny_run.ROOT / "CONTRIBUTING.md").read_text()
    file, code = re.search(
        r"all of `(\w+\.py)`:\n\n```python\n(.*?)```", text, re.S
    ).groups()
    own_lines = code[code.index("class ") :].splitlines()
    assert len(own_lines) <= 25
    (own / file).write_text(code)
    return f"{file.removesuffix('.py')}.Leaky"


SMALL = ["--config.model.features=8", "--config.model.depth=1", "--noreport"]
SMALL += [
    f"--config.train.{key}=2" for key in ("steps", "eval_every", "checkpoint_every")
]


def test_the_example_is_proved_trained_and_read_again(leaky, parsed, tmp_path, capsys):
    quick = ("refusals", "one call = pieces = steps", "packing", "isolation")
    findings = laws.examine(get(leaky)(6), only=quick)
    assert [f for f in findings if not f.passed] == []
    workdir = tmp_path / "run"
    flag = "--config.model.layer_args.span=16"
    config = f"--config=pixels:digits,layer={leaky}"
    parsed(config, flag, *SMALL, f"--workdir={workdir}")
    assert main.main(["train.main"]) == 0
    assert "test" in capsys.readouterr().out
    kept = json.loads((workdir / "config.json").read_text())["model"]
    assert kept["layer"] == leaky and kept["layer_args"] == {"span": 16.0}
    run = runs.load_run(workdir, trust=True)
    assert mixer(run.model).span == 16.0 and run.step == 2
    assert records.read_results(workdir)["parallel_vs_recurrent"] < 1e-4


@pytest.mark.slow
def test_every_law_holds_for_the_example(leaky, capsys):
    assert laws_command.main(["--layer", leaky]) == 0
    assert "every law holds" in capsys.readouterr().out


def tiny(arg):
    config = pixels.get_config(arg)
    config.model.update(features=6, depth=1)
    config.train.update(steps=2, batch_size=8, eval_every=2, checkpoint_every=2)
    return config


@pytest.mark.slow
def test_a_table_compares_the_example(leaky, monkeypatch, tmp_path, capsys):
    task = reproduce.Task(tiny, "digits", ("gru",))
    monkeypatch.setitem(reproduce.TASKS, "digits", task)
    page = tmp_path / "results.md"
    page.write_text("<!-- digits:begin -->\nold\n<!-- digits:end -->\n")
    monkeypatch.setattr(reproduce, "PAGE", page)
    command = ["--layers", f"{leaky},gru", "--seeds", "0"]
    command += ["--workdir", str(tmp_path / "runs")]
    assert reproduce.main(command) == 0
    printed = capsys.readouterr().out
    assert f"| `{leaky}` | 0." in printed and "| `gru` | 0." in printed
    assert "old" in page.read_text()  # it shows the layers of the project
    assert reproduce.main([*command, "--page", str(page)]) == 0
    assert f"| `{leaky}` | 0." in page.read_text()


def test_a_contest_takes_a_layer_of_ones_own(leaky, monkeypatch, tmp_path):
    contenders = []

    def run_contender(task, contender, seeds, workdir):
        contenders.append(contender)
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "run_contender", run_contender)
    with pytest.raises(KeyboardInterrupt):
        contest.table("mqar", [leaky], [0], tmp_path)
    assert [c.layer for c in contenders] == [leaky]
    config = contest.config_of(contest.CONTESTS["mqar"], contenders[0])
    assert config.model.features >= 4
    with pytest.raises(
        ValueError, match=r"must be among .* got 'nope'; a layer of your"
    ):
        contest.table("mqar", [leaky, "nope"], [0], tmp_path)
