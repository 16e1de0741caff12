"""What `test_sharding` does in a process that has eight devices.

    python tests/sharded_steps.py steps LAYERS MESH ...
    python tests/sharded_steps.py run WORKDIR STEPS MESH

The first takes three training steps of a small model on one device and on every mesh,
such as data=2,fsdp=4, and prints a JSON object; the second trains until a step.
"""

import json
import sys

import jax
import numpy as np
import tiny_run

from configs import common
from layers.models.build import FRAME_LAYERS, build
from train import loop, losses, optimizers, sharding, state, step

B, L, WORDS = 16, 12, 8
# Sizes that 8 divides wherever a rule splits.
FIELDS = {
    "s4": dict(state_size=32),
    "dss": dict(state_size=16),
    "s4d": dict(state_size=16),
    "s5": dict(state_size=32),
    "lru": dict(state_size=16),
    "mamba2": dict(state_size=8, head_size=4),
    "rg_lru": dict(heads=8),
    "h3": dict(state_size=16, taps=4),
    "hyena": dict(hidden=16),
    "gla": dict(rank=8),
    "conv_s5": dict(state_size=16),
}
HEADS = ("retention", "lightning", "gla", "delta_net", "gated_delta_net")
HEADS += ("attention", "frame_attention", "full_frame_attention")


def config_of(layers: str, **sizes):
    """Of a model of words, or of frames, whose blocks are these layers, such as
    "s5+mamba"."""
    config = common.base()
    common.set_layer(config, layers)
    names = layers.split("+")
    for name in names:
        fields = FIELDS.get(name, {})
        if name in HEADS:
            fields = fields | dict(heads=4)
        own = config.model.layer_args
        (own if len(names) == 1 else own[name]).update(fields)
    # One repetition in the scan, and one block outside of it.
    config.model.update(features=16, depth=len(names) + 1, dropout=0.1, mlp=1.0)
    if {*names} & {*HEADS}:
        # The gradient of a norm over a head is rounding where its output is next to
        # nothing: not of few features, nor of what dropout has left.
        config.model.update(features=32, dropout=0.0)
    config.model.update(encoder="token", vocab_size=WORDS, length=L)
    config.model.update(outputs=WORDS, head="token")
    if layers in FRAME_LAYERS:
        config.model.update(encoder="video", outputs=1, vocab_size=0)
        config.model.video.update(size=(4, 4), channels=1, depths=(8, 16))
    # Of a gradient that is rounding alone, Adam would make a whole step.
    config.optimizer.update(lr=1e-2, schedule="constant", eps=1e-3)
    config.train.update(accumulate=2, ema=0.9, batch_size=B)
    config.mesh.update(**sizes)
    return config


def steps(config, devices) -> dict:
    """Of three steps: the losses and gradient norms, and (whole, on one device) sizes
    of what the state holds."""
    mesh, model = sharding.make_mesh(config, devices), build(config.model)
    rng = np.random.default_rng(0)

    def batch():
        if config.model.encoder == "video":
            clips = rng.integers(256, size=(B, 5, 4, 4, 1), dtype=np.uint8)
            numbers = {"inputs": clips[:, :-1], "targets": clips[:, 1:]}
            return sharding.place(numbers | {"mask": np.ones((B, 4), bool)}, mesh)
        words = rng.integers(0, WORDS, (B, L + 1)).astype(np.int32)
        mask = np.arange(L) < rng.integers(L // 2, L + 1, (B, 1))
        numbers = {"inputs": words[:, :-1], "targets": words[:, 1:], "mask": mask}
        return sharding.place(numbers, mesh)

    first = batch()
    boxes = state.param_boxes(model, first)
    sharding.check_tensor(model, boxes, mesh)
    sharding.check_sequence(model, first["inputs"], mesh)
    optimizer, *_ = optimizers.make(config, boxes)
    create = state.creator(model, optimizer, first, 0, mesh, ema=True)
    places = jax.tree.map(lambda x: x.sharding, state.abstract(create))
    loss = losses.make("frames" if config.model.encoder == "video" else "token")
    update = step.make_train_step(model, optimizer, loss, config, True, places)
    evaluate = step.make_eval_step(model, loss, True, mesh)
    current, measured = create(), []
    for _ in range(3):
        given = current
        current, means = update(given, first)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))  # its memory is used
        measured += [float(means["loss"]), float(means["grad_norm"])]
        first = batch()
    sums = evaluate(current.variables(), first)
    sizes = {}
    for part in ("params", "ema", "opt_state"):
        for name, leaf in state.named_leaves(getattr(current, part)):
            where = leaf.sharding.shard_shape(leaf.shape)
            assert all(s.data.shape == where for s in leaf.addressable_shards)
            sizes[f"{part}/{name}"] = leaf.shape, where
    return {"measured": [*measured, float(sums["loss"])], "sizes": sizes}


def run_config(until: int):
    """Of a run that does not depend on the devices, but for rounding, see FLAGS of
    `test_sharding`."""
    config = tiny_run.config(steps=until, log_every=1, accumulate=2, batch_size=16)
    config.model.norm = "layer"
    config.optimizer.schedule = "constant"
    return config


def sizes_of(mesh: str) -> dict[str, int]:
    """Of such as data=2,fsdp=4."""
    pairs = (pair.split("=") for pair in mesh.split(","))
    return {axis: int(size) for axis, size in pairs}


def main(what: str, *arguments: str) -> None:
    assert jax.device_count() == 8
    if what == "run":
        workdir, until, mesh = arguments
        config = run_config(int(until))
        config.mesh.update(sizes_of(mesh))
        loop.run(config, workdir)
        return
    layers, *meshes = arguments
    found = {"": steps(config_of(layers), jax.devices()[:1])}
    for mesh in meshes:
        found[mesh] = steps(config_of(layers, **sizes_of(mesh)), None)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
