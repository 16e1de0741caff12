"""python -m train.plan: what a step needs on a machine."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from configs import pixels, synthetic
from kernels.check import targets
from layers.models.build import build
from train import data, resolve, state
from train.plan import compiling, machine, operations, page, remedies, samples
from train.plan.compiling import Task
from train.plan.figures import Plan
from train.plan.machine import Machine
from train.plan.program import Program, Runs, nbytes
from train.plan.workloads import WORKLOADS

# As compilers write it, shortened: a loop of 6 with a loop in it whose length only its
# condition tells, from 2 to 512 by 3, and one of which nobody says how long it is.
TEXT = """HloModule jit_train_step, is_scheduled=true, num_partitions=4

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x.1, %y.1)
}

%inner_condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %end.1 = s32[]{:T(128)} constant(512)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %end.1), direction=LT
}

%inner_body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %x.2 = f32[8]{0:T(128)S(1)} get-tuple-element(%p.2), index=1
  %call.2 = f32[8]{0} custom-call(%x.2), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/stack"}
  %permute.2 = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%call.2), channel_id=4, source_target_pairs={{0,1}}
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %three.2 = s32[]{:T(128)} constant(3)
  %more.2 = s32[]{:T(128)} add(%i.2, %three.2)
  ROOT %done.2 = (s32[], f32[8]) tuple(%more.2, %x.2)
}

%outer_condition (p.3: (s32[], bf16[4,128])) -> pred[] {
  %p.3 = (s32[], bf16[4,128]{1,0}) parameter(0)
  ROOT %unknown.3 = pred[] custom-call(%p.3), custom_call_target="elsewhere"
}

%outer_body (p.4: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p.4 = (s32[], bf16[4,128]{1,0}) parameter(0)
  %x.4 = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.4), index=1
  %gather.4 = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%x.4), channel_id=1, dimensions={0}
  %gathered.4 = bf16[16,128]{1,0} all-gather-done(%gather.4)
  %two.4 = s32[] constant(2)
  %start.4 = s32[] copy(%two.4)
  %zeros.4 = f32[8]{0} broadcast(%two.4), dimensions={}
  %tuple.4 = (s32[], f32[8]{0}) tuple(%start.4, %zeros.4)
  %loop.4 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%tuple.4), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(f)/while"}
  ROOT %next.4 = (s32[], bf16[4,128]) tuple(%p.4, %x.4)
}

ENTRY %main.5 (a: f32[10,3], b: f32[]) -> f32[10,3] {
  %a = f32[10,3]{1,0} parameter(0)
  %b = f32[] parameter(1)
  %reduced = (f32[10,3]{1,0:T(8,128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, /*index=1*/%b), replica_groups={{0,1,2,3}}, to_apply=%add.1, metadata={op_name="jit(train_step)/grads" stack_frame_id=1}
  %scattered = f32[5,3]{1,0} reduce-scatter(%a), dimensions={0}, to_apply=%add.1
  %summed = f32[10,3]{1,0} all-reduce-start(%a), to_apply=%add.1
  %summed.done = f32[10,3]{1,0} all-reduce-done(%summed)
  %state = (s32[], bf16[4,128]{1,0}) tuple(%b, %a)
  %known = (s32[], bf16[4,128]{1,0}) while(%state), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[10,3]{1,0} copy(%a)
}
"""  # noqa: E501


def test_every_collective_with_its_bytes():
    found = Program(TEXT).collectives()
    assert [(one.kind, one.size, one.runs) for one in found] == [
        ("collective-permute", 32, Runs(6 * 170)),  # by bytes per step
        ("all-gather", 2 * 16 * 128, Runs(6)),
        ("all-reduce", 4 * 30 + 4, Runs(1)),
        ("reduce-scatter", 4 * 30, Runs(1)),  # what goes in is more
        ("all-reduce", 4 * 30, Runs(1)),
    ]
    assert found[0].bytes_per_step == 32 * 6 * 170
    assert found[2].source == "jit(train_step)/grads"


def test_calls_of_kernels_count_as_often_as_a_step_makes_them():
    assert Program(TEXT).kernels() == [Runs(6 * 170)]
    assert Program(TEXT).loops() and not Program("").loops()


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    unknown = re.sub(r", backend_config=.*", "", TEXT)
    runs = {one.kind: one.runs for one in Program(unknown).collectives()}
    assert runs["all-gather"] == Runs(1, False)
    assert runs["collective-permute"] == Runs(170, False)
    assert runs["all-reduce"] == Runs(1, True)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("(pred[3]{0}, s4[5]{0}, c64[2,2]{1,0:T(8,128)})", 3 + 3 + 32),
        ("f8e4m3fn[7]{0}", 7),
        ("bf16[<=4,2]{1,0}", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert nbytes(shape) == size


def test_operations_are_counted_as_often_as_loops_run():
    def f(x, w):
        def body(x, w):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(jax.checkpoint(body), x, w)
        return jnp.sum(jnp.fft.rfft(x).real)

    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    transform = 8 * 5 * 16 * math.log2(16) / 2
    products = 5 * 2 * 8 * 16 * 16
    assert operations.flops(jax.make_jaxpr(f)(x, w).jaxpr) == products + transform
    backwards = operations.flops(jax.make_jaxpr(jax.grad(f))(x, w).jaxpr)
    assert backwards >= 3 * products + transform
    convolve = jax.make_jaxpr(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"))
    jaxpr = convolve(jnp.zeros((2, 3, 8, 8)), jnp.zeros((4, 3, 5, 5))).jaxpr
    assert operations.flops(jaxpr) == 2 * (2 * 4 * 4 * 4) * (3 * 5 * 5)


def small(**model):
    config = pixels.get_config("digits,layer=s5")
    config.model.update(dict(features=32, depth=4) | model)
    config.model.layer_args.state_size = 8
    config.train.batch_size = 16
    return config


@pytest.fixture(scope="module")
def task():
    config = small()
    return Task(config, *samples.of(config))


@pytest.fixture(scope="module")
def here(task):
    return compiling.plan(task, Machine("here", tuple(jax.devices()), 10**12))


def test_a_plan_adds_up(here):
    assert here.held["parameters"] == 4 * here.parameters
    assert here.held["batch"] == 16 * (64 * 4 + 4 + 64)  # inputs, targets, mask
    state_bytes = here.held["optimiser state"] + here.held["averaged weights"]
    assert 3 * here.held["parameters"] <= state_bytes < 3.1 * here.held["parameters"]
    assert here.needed == (
        here.arguments + here.temporaries + here.outputs + here.program
    )
    assert here.free == 10**12 - here.needed and here.fits
    # 4 blocks of [16, 64, 32] numbers at least, and all are part of the temporaries
    assert here.activations > 4 * 16 * 64 * 32 * 4
    assert here.products > here.flops > 0  # the compiler takes a stack for one block
    assert here.kernels["linear_scan"][0] == "xla"
    assert here.collectives == () and here.seconds > 0
    assert json.loads(json.dumps(here.as_json()))["fits"] is True


@pytest.mark.slow
def test_a_step_in_pieces_needs_the_memory_of_one():
    config = synthetic.get_config("copying,layer=s5")
    config.model.update(features=8)
    config.model.layer_args.state_size = 4
    config.data.length = 4096
    config.train.batch_size = 1
    machine, found = Machine("here", tuple(jax.devices()), 10**12), []
    for chunk in (0, 128):
        config.train.chunk = chunk
        found.append(compiling.plan(Task(config, *samples.of(config)), machine))
    whole, pieces = found
    assert pieces.activations < whole.activations / 16
    assert pieces.temporaries < whole.temporaries / 8


def test_what_does_not_fit_gets_a_change_that_was_tried(task, here):
    tight = Machine("here", tuple(jax.devices()), here.needed - 1)
    assert not dataclasses.replace(here, memory=tight.memory).fits
    told = []
    found = remedies.find(task, tight, told.append)
    assert found.fits and found.needed < here.needed and found.seconds > 0
    assert told[-1].startswith(f"tried {remedies.said(found.changes)}: fits, needs ")
    assert all("does not fit" in line for line in told[:-1])
    assert found.changes == {"model.remat": True}  # what costs least, and is enough


def stub(needs):
    """A `compiling.plan` that compiles nothing: (changes) -> bytes, None where state
    and batch alone are too many."""

    def plan(task, machine, changes, trial):
        assert trial
        needed = needs(changes)
        return Plan(
            machine="", kind="", devices=8, note="", mesh={}, model="", batch=64,
            parameters=1, changes=changes, held={}, memory=100,
            needed=200 if needed is None else needed,
            seconds=None if needed is None else 1.0,
        )  # fmt: skip

    return plan


EIGHT = Machine("gpu:h200:8", (None,) * 8, 100)


def tried(task, needs):
    told = []
    found = remedies.find(task, EIGHT, told.append, stub(needs))
    names = [re.sub(r"--config\.\w+\.", "", line) for line in told]
    return found, [re.match(r"tried (.*?):", line)[1] for line in names]


def test_changes_are_tried_in_the_order_that_is_stated(task):
    config = compiling.changed(task.config, {"train.batch_size": 32})
    task = dataclasses.replace(task, config=config)
    found, names = tried(task, lambda changes: 101)
    assert found is None
    assert names == [
        "remat=True",
        "accumulate=4",
        "remat=True accumulate=4",
        "fsdp=8",
        "fsdp=8 remat=True",
        "fsdp=8 remat=True accumulate=4",
    ]


@pytest.mark.parametrize(
    ("enough", "last"),
    [
        (2, ["fsdp=8", "fsdp=2"]),
        (4, ["fsdp=8", "fsdp=2", "fsdp=4"]),
        (8, ["fsdp=8", "fsdp=2", "fsdp=4"]),
    ],
)
def test_of_a_family_that_can_the_smallest_that_is_enough(task, enough, last):
    found, names = tried(
        task, lambda changes: 90 if changes.get("mesh.fsdp", 0) >= enough else 101
    )
    assert found.changes == {"mesh.fsdp": enough}
    assert names == ["remat=True", "accumulate=2", "remat=True accumulate=2", *last]


def test_what_is_not_compiled_counts_as_tried(task):
    found, names = tried(
        task, lambda changes: 90 if changes.get("mesh.fsdp", 0) > 2 else None
    )
    assert found.changes == {"mesh.fsdp": 4}
    assert names[-3:] == ["fsdp=8", "fsdp=2", "fsdp=4"]


def test_a_family_that_is_refused_is_left(task):
    def refuse(changes):
        if "mesh.fsdp" in changes:
            raise ValueError("mesh.fsdp must be 1")
        return 101

    found, names = tried(task, refuse)
    assert found is None and names.count("fsdp=8") == 1 and "fsdp=2" not in names


@pytest.mark.parametrize(
    ("name", "count"),
    [("tpu:v5e", 1), ("tpu:v5e:16x16", 256), ("gpu:h200:8", 8), ("gpu:h100:2x8", 16)],
)
def test_a_target_has_as_many_devices_as_its_topology(name, count):
    target = targets.find(name)
    assert target.name == name and target.count == count
    first = ":".join(name.split(":")[:2])
    same = dataclasses.replace(target, name=first, topology="")
    assert same == targets.TARGETS[first]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu:v9", "must be one of tpu:v5e, tpu:v6e, gpu:h100, gpu:h200, alone or"),
        ("v5e:2x2", "must be one of"),
        ("gpu:h200:8x", "must be one of"),
        ("gpu:h200:", "must have a topology after its last :"),
        ("tpu:v5e:3x5", "two even numbers of chips, such as v5e:4x4"),
        ("tpu:v5e:16", "two even numbers of chips"),
        ("gpu:h200:99999999", "at most 65536 devices"),
    ],
)
def test_targets_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        targets.find(name)


def test_a_mesh_and_a_batch_that_do_not_divide(task):
    one = Machine("here", tuple(jax.devices()), None)
    with pytest.raises(ValueError, match=r"mesh\.data x .* 1, got 3"):
        compiling.plan(task, one, {"mesh.data": 3})
    with pytest.raises(ValueError, match=r"train\.accumulate = 3, got 16"):
        compiling.plan(task, one, {"train.accumulate": 3})


@pytest.mark.parametrize(
    ("problem", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (1.50G) exceeds available HBM (15.75G).\n\nmore",
            100 + 3 * 2**29,
        ),
        ("RESOURCE_EXHAUSTED: out of memory. Used 2.00M of 1.00M hbm.", 2 * 2**20),
        ("RESOURCE_EXHAUSTED: too much", None),
    ],
)
def test_what_a_compiler_says_of_too_little_memory(problem, needed):
    refused, found = compiling._full(problem, 100)
    assert refused == problem.splitlines()[0] and found == needed


COMMAND = (sys.executable, "-m", "train.plan", "--config", "pixels:digits,layer=s5")
TINY = ("--config.model.features=8", "--config.model.depth=1")


def command(*arguments):
    return subprocess.run(
        [*COMMAND, *TINY, *arguments],
        cwd=tiny_run.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_eight_gpus_emulated(tmp_path):
    file = tmp_path / "plan.json"
    done = command("--target=gpu:h200:8", "--emulate", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert "emulated: 8 CPU devices stand for gpu:h200:8" in done.stdout
    (found,) = json.loads(file.read_text())
    assert found["devices"] == 8 and found["mesh"]["data"] == 8
    assert found["memory"] == targets.TARGETS["gpu:h200"].memory
    # the gradients of all parameters, and a few sums
    size = found["exchanged"]["all-reduce"]["bytes"]
    assert found["held"]["parameters"] <= size < 2 * found["held"]["parameters"]
    assert found["held"]["batch"] == 64 // 8 * (64 * 4 + 4 + 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=gpu:h300:8"], "target must be one of tpu:v5e"),
        (
            ["--target=gpu:h200:8", "--emulate", "--config.train.batch_size=12"],
            "train.batch_size must be a positive multiple of 8",
        ),
        (["--workload=s5_path_x"], "--config must not be there with --workload"),
    ],
    ids=["target", "batch", "workload"],
)
def test_mistakes_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_emulated_devices_must_have_been_asked_for():
    with pytest.raises(ValueError, match="stands for 8 devices, and JAX has started"):
        machine.find("gpu:h200:8", emulate=True)


@pytest.mark.parametrize(
    "config",
    [
        dict(name="digits", target="next"),
        dict(name="digits", layout="image"),
        dict(name="mqar", length=32, vocab_size=32, pairs=4),
        dict(name="moving_digits", length=5, side=32, digit_side=14),
        dict(name="moving_digits", length=5, side=16, digit_side=8, reconstruct=True),
    ],
    ids=lambda config: config["name"],
)
def test_the_shapes_of_a_batch_follow_from_the_spec(config):
    dataset = data.load(config)
    batch = next(dataset.train(1, 0))
    shapes = samples.of_spec(dataset.spec)
    found = {k: (v.shape, v.dtype) for k, v in shapes.items()}
    assert found == {k: (v.shape, v.dtype) for k, v in batch.items()}
    if config["name"] in data.SPECS:
        assert data.known(config) == dataset.spec


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (dict(name="listops", folder="nowhere", max_length=50), (1, 50)),
        (dict(name="mnist", folder="nowhere"), (1, 784)),
        (dict(name="cifar", folder="nowhere"), (1, 1024, 3)),
        (dict(name="cifar", color="gray", layout="image"), (1, 32, 32, 1)),
        (dict(name="frames", folder="nowhere", size=(4, 6)), (1, 19, 4, 6, 3)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_data_need_not_be_there_where_the_config_says_what_they_are(config, shape):
    assert samples.of_spec(data.known(config))["inputs"].shape == shape


def test_what_only_a_file_says_is_asked_of_the_file():
    assert data.known(dict(name="frames", folder="nowhere")) is None
    assert data.known(dict(name="clips", path="nowhere.npz")) is None
    with pytest.raises(ValueError, match="layers is no argument of the dataset"):
        data.known(dict(name="mnist", layers="x"))
    with pytest.raises(ValueError, match="'rgb', 'gray', got 'blue'"):
        data.known(dict(name="cifar", color="blue"))


def parameters(name):
    task = WORKLOADS[name].task(256)
    config = resolve.complete(task.config, task.spec)
    assert config.train.batch_size == 256 // WORKLOADS[name].sequence
    shapes = state.param_shapes(build(config.model), task.one)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.slow
def test_workloads_are_what_they_say():
    sizes = {name: parameters(name) for name in WORKLOADS}
    mamba, delta = sizes["mamba_130m"], sizes["gated_delta_net_130m"]
    # 129 million as published, whose head shares the embedding's weights
    assert abs(mamba - 768 * 50_280 - 129.1e6) < 0.2e6
    assert abs(delta - mamba) < 0.03 * mamba
    assert WORKLOADS["s4d_path_x"].task(8).config.train.batch_size == 16


def test_the_page_is_what_the_files_say():
    assert page.PAGE.read_text() == page.written(page.PAGE.read_text(), page.FOLDER)


def test_what_is_planned_is_on_the_page(tmp_path, monkeypatch, here):
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    plans = [page._summary(here.as_json())]
    page.keep("gpu:h200:8", "mamba_130m", plans, {"jax": "1"})
    page.keep("gpu:h200:8", "s5_path_x", plans, {"jax": "1"})
    text = page.written(page.PAGE.read_text(), tmp_path)
    assert "### gpu:h200:8\n\njax 1\n" in text and "### tpu" not in text
    assert "over 8 devices (`mesh.sequence`)" not in text
    page.keep("gpu:h200:8", "s5_64k", plans, {"jax": "1"})
    long = page.written(page.PAGE.read_text(), tmp_path)
    assert "over 8 devices (`mesh.sequence`):\n\n| workload |" in long
    rows = re.findall(r"^\| (S5, Path-X|Mamba, 24 x 768, language) \|", text, re.M)
    assert rows == ["S5, Path-X", "Mamba, 24 x 768, language"]
    assert text != page.PAGE.read_text()
    page.keep("gpu:h200:8", "s5_path_x", plans, {"jax": "2"})
    assert "Mamba, 24" not in page.written(page.PAGE.read_text(), tmp_path)
