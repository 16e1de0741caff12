"""The code of docs/other_code.md, as it stands, and what else it says."""

import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from jax import export

from configs import own, pixels
from kernels.tolerance import assert_close
from layers import GRU, S5, Cell, Sequence
from layers.laws.examples import CASES
from layers.parameters import Alike, Logical, logical
from train import loop, predict, runs

PAGE = (tiny_run.ROOT / "docs" / "other_code.md").read_text()
# Title -> its blocks of code.
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S)
    for section in PAGE.split("\n## ")[1:]
}
FILE, ELSEWHERE = "A trained model in a file", "Elsewhere, without this repository"
NUMBERS = "A model of numbers in a file"


def executed(title):
    """What the blocks of a section define, run one after another."""
    names = {"__name__": title}
    for block in SECTIONS[title]:
        exec(compile(block, title, "exec"), names)
    return names


def test_every_section_is_executed():
    assert len(SECTIONS) == 7 and all(SECTIONS.values())


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=[pytest.mark.slow] if title == "Equinox" else [])
        for title in SECTIONS
        if title not in (FILE, ELSEWHERE, NUMBERS)
    ],
)
def test_a_section_runs(title):
    if title == "Equinox":
        pytest.importorskip("equinox")
    names = executed(title)
    assert bool(jnp.all(jnp.isfinite(names["y"])))
    if "began" in names:  # episodes that end are what the rollout is to show
        assert names["began"][1:].any() and not names["began"].all()


ALONE = """
import sys

sys.path.append({place!r})  # of flatbuffers
OURS = {{"kernels", "ssm", "layers", "train", "configs", "flax"}}


class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Refusing())
{code}
assert not OURS & {{*sys.modules}}
"""


@pytest.mark.slow
def test_a_trained_model_runs_without_this_repository(tmp_path, monkeypatch):
    flatbuffers = pytest.importorskip("flatbuffers")
    config = pixels.get_config("digits,target=next,layer=s5")
    config.model.update(features=6, depth=2)
    config.model.layer_args.state_size = 4
    config.train.update(steps=1, batch_size=4, eval_every=1, checkpoint_every=1)
    monkeypatch.chdir(tmp_path)
    loop.run(config, Path("runs/next"))
    executed(FILE)
    place = str(Path(flatbuffers.__file__).parents[1])
    code = ALONE.format(place=place, code=SECTIONS[ELSEWHERE][0])
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run = runs.load_run("runs/next")
    state, tokens = run.model.init_state(3), jnp.array([3, 1, 4])
    apply = jax.jit(run.model.apply)
    for _ in range(5):
        logits, state = apply(run.variables, tokens[:, None], state)
        tokens = logits[:, 0].argmax(axis=-1)
    assert done.stdout.strip() == str(tokens.tolist())


@pytest.mark.slow
def test_a_model_of_numbers_takes_them_as_its_file_had_them(tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    monkeypatch.chdir(tmp_path)
    inputs = np.random.default_rng(0).normal([5, -200], [0.1, 30], (40, 6, 2))
    np.savez("my.npz", inputs=inputs, targets=np.arange(40) % 3)
    config = own.get_config("path=my.npz,layer=gru")
    config.model.update(features=4, depth=1)
    config.train.update(steps=1, batch_size=8, eval_every=1, checkpoint_every=1)
    loop.run(config, Path("runs/my"))
    executed(NUMBERS)
    begin, step = (
        export.deserialize(bytearray(Path(f"{name}.jax").read_bytes()))
        for name in ("begin", "step")
    )
    sequences = inputs[:3].astype(np.float32)
    state = begin.call(sequences[:, 0])
    for numbers in sequences.swapaxes(0, 1):
        logits, state = step.call(numbers, state)
    expected = predict.predict(runs.load_run("runs/my"), inputs[:3])
    assert_close(jax.nn.softmax(logits), expected, "gradient")


# The cell.


def test_a_cell_says_what_it_takes():
    cell = Cell(GRU(4))
    assert cell.num_feature_axes == 1
    carry = cell.initialize_carry(jax.random.key(0), (3, 4))
    assert carry.shape == (3, 4)
    with pytest.raises(
        ValueError, match=r"input_shape: must be one axis of rows and 1"
    ):
        cell.initialize_carry(jax.random.key(0), (2, 3, 4))
    with pytest.raises(ValueError, match=r"x: must be \[B, L, 4\], got \(3, 1, 5\)"):
        cell.init(jax.random.key(0), carry, jnp.zeros((3, 5)))
    both = Cell(S5(4, 4, bidirectional=True))
    with pytest.raises(ValueError, match="bidirectional: must be False for init_state"):
        both.initialize_carry(jax.random.key(0), (3, 4))


def test_a_reset_concerns_its_row_alone():
    cell = Cell(GRU(4))
    x = jax.random.normal(jax.random.key(0), (2, 4))
    carry = jax.random.normal(jax.random.key(1), (2, 4))
    variables = cell.init(jax.random.key(2), carry, x)
    kept, _ = cell.apply(variables, carry, x)
    fresh, _ = cell.apply(variables, jnp.zeros_like(carry), x)
    found, _ = cell.apply(variables, carry, (x, jnp.array([False, True])))
    assert_close(found, jnp.stack([kept[0], fresh[1]]))
    assert np.abs(kept - fresh).max() > 0.01


# The boxes of parameters.


@pytest.mark.parametrize("like", ["", "log_dt"])
def test_a_box_survives_the_bridge_to_nnx(like):
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param(
                "scale", logical(nn.initializers.ones, "embed", like=like), (3,)
            )

    module = nnx.bridge.ToNNX(Scale(), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((2, 3)))
    assert module.scale.get_metadata()["logical_axes"] == ("embed",)
    assert_close(module(jnp.ones((2, 3))), jnp.ones((2, 3)))
    box = nnx.bridge.variables.to_linen_var(module.scale)
    assert type(box) is (Alike if like else Logical) and box.names == ("embed",)
    assert getattr(box, "like", "") == like


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4", "mamba", "hyena", "attention"])
def test_layers_are_the_same_in_nnx(name):
    layer = CASES[name]()
    x = jax.random.normal(jax.random.key(0), (2, 9, layer.features))
    module = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(1)).lazy_init(x)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    mask = Sequence(mask=jnp.arange(9) < jnp.array([[9], [6]]))
    found = module(x, module.init_state(2), mask)
    assert_close(found, layer.apply({"params": params}, x, None, mask))
