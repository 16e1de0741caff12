"""What a mixer's file says of itself, and what keeps it short enough to read."""

import ast
import re
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import pytest

import layers
from configs import common
from layers import FRAME_LAYERS, LAYERS, Mamba, build, facts
from layers.laws import examples
from layers.models import table

ROOT = Path(__file__).parents[1]
ALL = LAYERS | FRAME_LAYERS


class Own(nn.Module):
    """A user's layer."""

    PLACEMENT = facts.Placement("none", 2.0, "erf", 1e-3)
    EXAMPLES = facts.examples({}, wide={"width": 3})

    features: int
    width: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        return x, state

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.features))


class Plain(nn.Module):
    features: int


class OwnMamba(Mamba):
    pass


def block(layer, **model):
    config = common.base().model
    config.update(encoder="token", vocab_size=3, outputs=2, length=4, features=4)
    with config.ignore_type():
        config.update(layer=layer, layer_args={}, **model)
    return build(config).stack().pattern[0].keywords


def test_a_users_layer_places_itself():
    kept = block(f"{__name__}.Own")
    assert (kept["gate"], kept["mlp"], kept["gelu"]) == ("none", 8, "erf")
    assert kept["norm_epsilon"] == 1e-3
    asked = block(f"{__name__}.Own", gate="glu", mlp=1.0, gelu="tanh", norm_epsilon=0.0)
    assert (asked["gate"], asked["mlp"], asked["gelu"]) == ("glu", 4, "tanh")
    assert asked["norm_epsilon"] == 0.0


@pytest.mark.parametrize("cls", [Plain, OwnMamba])
def test_what_is_not_said_on_the_class_itself_is_the_default(cls):
    """A run of a user's subclass keeps the block that it began with."""
    assert facts.placement_of(cls) == facts.DEFAULT_PLACEMENT
    assert facts.placement_of(Mamba) != facts.DEFAULT_PLACEMENT
    assert facts.examples_of(cls) == {"": {}}


def test_a_users_examples_are_examined():
    made = {case: make() for case, make in examples.cases("my.Own", Own).items()}
    assert made == {
        "my.Own": Own(facts.FEATURES),
        "my.Own wide": Own(facts.FEATURES, 3),
    }
    (name,) = examples.cases("my.Plain", Plain)
    assert name == "my.Plain"


@pytest.mark.parametrize("name", ALL)
def test_every_layer_has_a_plain_example(name):
    assert next(iter(examples.cases(name, ALL[name]))) == name


def test_the_table_has_every_layer(capsys):
    assert table.main([]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(ALL)
    for name, row in zip(ALL, rows, strict=True):
        cell, what, papers, path, _ = (c.strip() for c in row.split("|")[1:-1])
        assert cell == f"`{name}`" and what
        assert re.fullmatch(r"\[.+\]\(https://\S+\)", papers.split(", ")[0]), name
        assert (ROOT / path.strip("`")).is_file()
    assert "refuses" in head and rows[-1].endswith("| `dt` |")


def test_the_fields_are_printed_as_the_config_has_them(capsys):
    table.main(["--fields"])
    printed = ast.parse(f"{{{capsys.readouterr().out}}}", mode="eval")
    fields = eval(compile(printed, "printed", "eval"))
    assert {k: v for k, v in fields.items() if v} == {
        k: v for k, v in common.LAYER_ARGS.items() if v
    }


LONG = {"S4", "DSS", "S5", "Attention", "ConvS5", "FrameAttention"}


def test_a_mixer_is_read_in_one_sitting():
    """At most 115 lines a file, and those of LONG no exception that is not needed."""
    lengths = {}
    for cls in ALL.values():
        path = ROOT / f"{cls.__module__.replace('.', '/')}.py"
        lengths.setdefault(path, (cls.__name__, len(path.read_text().splitlines())))
    long = {name for name, length in lengths.values() if length > 115}
    assert long == LONG, sorted(lengths.values())


def public_functions(path):
    """Functions that users of a module or of its classes may call. What Flax calls is
    left out: the signature of `__call__` is the contract, told in `layers/__init__.py`.
    """
    bodies = [("", ast.parse(path.read_text()).body)]
    while bodies:
        prefix, body = bodies.pop()
        for node in body:
            if isinstance(node, ast.ClassDef):
                bodies.append((f"{prefix}{node.name}.", node.body))
            elif isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                yield prefix + node.name, node


@pytest.mark.parametrize("ring", ["ssm", "layers"])
def test_public_functions_say_what_they_take_and_give(ring):
    found = 0
    for path in (ROOT / ring).rglob("*.py"):
        for name, function in public_functions(path):
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            arguments += [a for a in (given.vararg, given.kwarg) if a is not None]
            bare = [
                a.arg for a in arguments if a.annotation is None and a.arg != "self"
            ]
            assert not bare, f"{path}: {name} takes {bare}"
            if name.split(".")[-1] != "setup":
                assert function.returns is not None, f"{path}: {name}"
            found += 1
    assert found > 100


def test_the_readme_has_the_table_of_layers():
    assert table.markdown() in (table.ROOT / "README.md").read_text()


def test_every_layer_is_importable_by_its_class():
    assert {cls.__name__ for cls in ALL.values()} <= {*layers.__all__}


def test_the_page_of_rounding_has_every_layer():
    page = (ROOT / "layers" / "laws" / "rounding.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| 64 \|", page, re.MULTILINE) == [*LAYERS]
