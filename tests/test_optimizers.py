import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from configs import common
from layers import build
from layers.parameters import logical
from train import optimizers, state


def parameters():
    block = {
        "mixer": {"A_re": jnp.ones(3), "B": jnp.ones((3, 2)), "D": jnp.ones(3)},
        "gate": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3)},
    }
    return {"stack": {"block_0": block}, "head": {"kernel": jnp.ones((3, 2))}}


def settings(groups=None, **optimizer) -> ConfigDict:
    config = common.base()
    config.optimizer.update(schedule="constant", clip=0.0, **optimizer)
    config.train.steps = 100
    if groups is not None:
        config.groups = groups
    return config.lock()


def first_update(config, params, gradients):
    """The change of one step, of learning rate 1 per unit for Adam's first step."""
    tx, _, _ = optimizers.make(config, params)

    @jax.jit
    def step(params, gradients):
        return tx.update(gradients, tx.init(params), params)[0]

    return step(params, gradients)


def test_default_groups_sort_the_parameters():
    _, groups, _ = optimizers.make(settings(), parameters())
    ssm, taps, plain, rest = groups.values()
    mixer = "stack/block_0/mixer/"
    assert ssm == [mixer + "A_re", mixer + "B"] and taps == []
    assert set(plain) == {
        mixer + "D",
        "stack/block_0/gate/bias",
        "stack/block_0/norm/scale",
    }
    assert set(rest) == {"stack/block_0/gate/kernel", "head/kernel"}


def test_groups_scale_the_rate_and_the_decay():
    groups = [(r".*/B", dict(lr=0.25, wd=0.0)), (r".*/D", dict(lr=0.0)), (r".*", {})]
    config = settings(groups, lr=0.1, weight_decay=0.5)
    params = parameters()
    update = first_update(config, params, jax.tree.map(jnp.ones_like, params))
    mixer = update["stack"]["block_0"]["mixer"]
    np.testing.assert_allclose(mixer["B"], -0.025, rtol=1e-5)
    np.testing.assert_allclose(mixer["D"], 0)
    np.testing.assert_allclose(mixer["A_re"], -0.1 * (1 + 0.5), rtol=1e-5)


def test_clipping_sees_the_norm_over_all_groups():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    groups = [("a", dict(wd=0.0)), ("b", dict(wd=0.0))]
    # With eps far above the gradient Adam's first step is about gradient / eps.
    config = settings(groups, lr=1.0, eps=1e3)
    config.optimizer.clip = 5.0
    update = first_update(
        config, params, {"a": jnp.array([6.0]), "b": jnp.array([8.0])}
    )
    np.testing.assert_allclose(update["a"][0] * 1e3, -3.0, rtol=1e-2)
    np.testing.assert_allclose(update["b"][0] * 1e3, -4.0, rtol=1e-2)


def test_boxed_parameters_have_the_same_groups():
    params = {"a": nn.Partitioned(jnp.ones(2), names=("embed",)), "b": jnp.ones(2)}
    config = settings([("a", dict(lr=0.0)), ("b", {})])
    tx, groups, _ = optimizers.make(config, params)
    assert groups == {"a": ["a"], "b": ["b"]}
    plain = nn.meta.unbox(params)
    update, _ = tx.update(plain, nn.meta.unbox(tx.init(params)), plain)
    assert (update["a"] == 0).all() and (update["b"] != 0).all()


def test_shapes_are_enough():
    shapes = jax.eval_shape(parameters)
    _, groups, _ = optimizers.make(settings(), shapes)
    assert sum(map(len, groups.values())) == len(jax.tree.leaves(shapes))


def test_parameter_without_a_group_is_named():
    config = settings([(r".*/kernel", {}), (r".*/bias", {})])
    with pytest.raises(
        ValueError, match=r"block_0/mixer/A_re.*norm/scale.*'\.\*/bias'"
    ):
        optimizers.make(config, parameters())


def test_pattern_matches_the_whole_path():
    with pytest.raises(ValueError, match=r"without a group: head/kernel"):
        optimizers.make(settings([("kernel", {})]), {"head": {"kernel": jnp.ones(1)}})


def test_group_without_a_parameter_is_an_error_unless_optional():
    with pytest.raises(ValueError, match=r"lamda.*optional=True"):
        optimizers.make(settings([(".*/lamda", {}), (".*", {})]), parameters())
    groups = [(".*/lamda", dict(optional=True)), (".*", {})]
    tx, assigned, _ = optimizers.make(settings(groups), parameters())
    assert assigned[".*/lamda"] == []
    tx.init(parameters())


def test_unknown_and_negative_options_are_named():
    with pytest.raises(ValueError, match=r"decay must be one of lr, wd, optional"):
        optimizers.make(settings([(".*", dict(decay=0.0))]), parameters())
    with pytest.raises(ValueError, match=r"wd must be a factor"):
        optimizers.make(settings([(".*", dict(wd=-1.0))]), parameters())


def rates(**optimizer):
    config = settings()
    config.optimizer.update(lr=1.0, **optimizer)
    schedule = optimizers.make_schedule(config.optimizer, 100)
    return np.array([schedule(step) for step in range(101)])


def test_cosine_warms_up_and_ends_at_the_floor():
    values = rates(schedule="cosine", warmup=10, floor=0.1)
    np.testing.assert_allclose(values[:11], np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(values[55], (1 + 0.1) / 2, atol=1e-6)
    np.testing.assert_allclose(values[100], 0.1, atol=1e-6)
    assert (np.diff(values[10:]) <= 0).all()


def test_constant_and_inverse_square_root():
    np.testing.assert_allclose(rates(schedule="constant", warmup=0), 1.0)
    values = rates(schedule="inverse_sqrt", warmup=25)
    np.testing.assert_allclose(values[[0, 25, 100]], [0.0, 1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schedule="step"), "cosine, constant, inverse_sqrt.*'step'"),
        (dict(warmup=100), "warmup.*train.steps = 100.*100"),
        (dict(warmup=-1), "warmup.*-1"),
        (dict(floor=2.0), "floor.*2.0"),
        (dict(lr=-1.0), "lr.*-1.0"),
    ],
)
def test_bad_schedules_are_named(change, message):
    config = settings()
    config.optimizer.update(**change)
    with pytest.raises(ValueError, match=message):
        optimizers.make_schedule(config.optimizer, 100)


def test_a_least_squares_problem_is_solved():
    params = {"w": jnp.zeros(3)}
    config = settings([(".*", dict(wd=0.0))], lr=0.1)
    tx, _, _ = optimizers.make(config, params)
    target = jnp.array([1.0, -2.0, 0.5])

    @jax.jit
    def step(params, moments):
        gradients = jax.grad(lambda p: jnp.sum((p["w"] - target) ** 2))(params)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    moments = tx.init(params)
    for _ in range(300):
        params, moments = step(params, moments)
    np.testing.assert_allclose(params["w"], target, atol=1e-2)


class Declared(nn.Module):
    """Parameters of names that no config knows, two of them declared."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        ones = nn.initializers.ones
        size = (self.features,)
        step = self.param("my_step", logical(ones, "embed", like="log_dt"), size)
        gain = self.param("my_gain", logical(ones, "embed", like="bias"), size)
        mix = self.param("my_mix", logical(ones, "embed"), size)
        return x * step + gain * mix, state

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, 1))


def declared_groups(groups):
    """Pattern -> the names of a layer's own parameters, and the shapes of all, in a
    model whose blocks are scanned and one that is not."""
    config = settings(groups)
    model = config.model.copy_and_resolve_references()
    model.update(encoder="scalar", outputs=2, length=4, features=4, depth=3)
    with model.ignore_type():
        model.layer = (f"{__name__}.Declared", f"{__name__}.Declared")
        model.layer_args = {}
    batch = {"inputs": jnp.zeros((1, 4))}
    boxes = state.param_boxes(build(model), batch)
    tx, groups, _ = optimizers.make(config, boxes)
    tx.init(state.param_shapes(build(model), batch))  # labels fit without boxes
    return {
        pattern: sorted({p.split("/")[-1] for p in paths if "/mixer/" in p})
        for pattern, paths in groups.items()
        if any("/mixer/" in p for p in paths)
    }


def test_a_declared_parameter_learns_like_the_one_it_names():
    assert declared_groups(None) == {
        common.SSM: ["my_step"],
        common.SMALL: ["my_gain"],
        common.ALL: ["my_mix"],
    }


def test_a_pattern_that_names_the_parameter_itself_goes_before():
    own = (r".*/my_(step|mix)", dict(lr=0.5))
    assert declared_groups([own, *common.groups()]) == {
        own[0]: ["my_mix", "my_step"],
        common.SMALL: ["my_gain"],
    }
    assert declared_groups([(".*", {})]) == {".*": ["my_gain", "my_mix", "my_step"]}


def test_a_declared_parameter_is_shaped_and_named_like_any_other():
    x = jnp.zeros((1, 4, 3))
    variables = Declared(3).init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, nn.unbox(variables)["params"]) == {
        "my_step": (3,),
        "my_gain": (3,),
        "my_mix": (3,),
    }
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["my_step"] == specs["my_mix"]
