"""The workloads of docs/plan.md: published models, of data that need not be here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import common
from train.data import moving_digits
from train.data.spec import Spec
from train.plan import samples
from train.plan.compiling import Task, changed

# Machines of docs/plan.md: of published models, and of one sequence over all devices.
PUBLISHED = ("tpu:v5e:16x16", "gpu:h200:8")
OVER_TIME = ("tpu:v5e:2x4", "gpu:h200:8")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training step.

    Attributes:
        title: for a reader.
        source: where its settings are from.
        spec: of its data.
        layer: of every block.
        rows: of the published global batch.
        fields: of the layer, those that are not its defaults.
        settings: key of the config -> value.
        machines: those of docs/plan.md that it is planned for.
    """

    title: str
    source: str
    spec: Spec
    layer: str
    rows: int
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    machines: tuple[str, ...] = PUBLISHED

    @property
    def sequence(self) -> int:
        """Over how many devices a sequence is split."""
        return self.settings.get("mesh.sequence", 1)

    def task(self, devices: int) -> Task:
        """The task on so many devices: the published batch, or one row for each device
        (for all that a sequence is split over) where those are more."""
        config = common.base()
        common.set_layer(config, self.layer)
        config.model.layer_args.update(self.fields)
        config.groups = _groups(self.layer)
        least = devices // self.sequence
        rows = -(-self.rows // least) * least
        settings = {**self.settings, "train.batch_size": rows}
        return Task(changed(config, settings), self.spec, samples.of_spec(self.spec))


def _groups(layer: str) -> list:
    """ConvS5's parameters all learn alike, see configs/video.py."""
    if layer == "conv_s5":
        return [(".*", dict(lr=1.0, wd=1.0))]
    return common.groups()


PATH_X = Spec("scalar", 128 * 128, 2, "classification")
# The words of the Pile by GPT-NeoX's tokenizer, 50,277, to the next multiple of 8.
PILE = Spec("token", 2_048, 50_280, "token", vocab_size=50_280, causal=True)
LANGUAGE = {
    "model.features": 768,
    "model.head": "token",
    "model.norm": "rms",
    "model.dtype": "bfloat16",
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.1,
}


def _moving_mnist(
    frames: int,
    rows: int,
    settings: Mapping,
    machines: tuple[str, ...] = PUBLISHED,
) -> Workload:
    """ConvS5 as its code has it, on videos of so many frames."""
    return Workload(
        title=f"ConvS5, Moving MNIST, {frames:,} frames",
        source="https://arxiv.org/abs/2310.19694, its code's settings",
        spec=moving_digits.spec(length=frames, side=64),
        layer="conv_s5",
        rows=rows,
        fields=dict(state_size=128),
        settings={
            "model.depth": 8,
            "model.features": 128,
            "model.head": "token",
            "model.prenorm": False,
            "model.gate": "none",
            "model.remat": True,
            "model.video.depths": (64, 128, 256),
            "optimizer.b2": 0.95,
            "optimizer.weight_decay": 1e-5,
            **settings,
        },
        machines=machines,
    )


def _bytes(
    layer: str, title: str, length: int, dtype: str = "float32", **fields: Any
) -> Workload:
    """4 blocks of 256 features on one document of so many bytes, over 8 devices."""
    return Workload(
        title=f"{title}, {length:,} bytes",
        source="small models, to see what depends on the length",
        spec=Spec("token", length, 256, "token", vocab_size=256, causal=True),
        layer=layer,
        rows=1,
        fields=fields,
        settings={
            "model.depth": 4,
            "model.features": 256,
            "model.head": "token",
            "model.norm": "rms",
            "model.dtype": dtype,
            "model.remat": True,
            "mesh.sequence": 8,
        },
        machines=OVER_TIME,
    )


WORKLOADS = {
    "s5_path_x": Workload(
        title="S5, Path-X",
        source="https://github.com/lindermanlab/S5, bin/run_experiments",
        spec=PATH_X,
        layer="s5",
        rows=32,
        fields=dict(
            state_size=256,
            blocks=16,
            c_init="complex_normal",
            dt_min=1e-4,
            bidirectional=True,
        ),
        settings={
            "model.depth": 6,
            "model.features": 128,
            "model.gate": "half_glu1",
            "model.norm": "batch",
            "optimizer.clip": 0.0,
        },
    ),
    "s4d_path_x": Workload(
        title="S4D-LegS, Path-X",
        source="https://github.com/state-spaces/s4, configs/experiment/lra",
        spec=PATH_X,
        layer="s4d",
        rows=16,
        fields=dict(state_size=64, spectrum="legs", dt_min=1e-4, bidirectional=True),
        settings={
            "model.depth": 6,
            "model.features": 256,
            "model.norm": "batch",
            "optimizer.clip": 0.0,
        },
    ),
    "mamba_130m": Workload(
        title="Mamba, 24 x 768, language",
        source="https://arxiv.org/abs/2312.00752, 0.5 million tokens a batch",
        spec=PILE,
        layer="mamba",
        rows=256,
        fields={},
        settings={**LANGUAGE, "model.depth": 24},
    ),
    "gated_delta_net_130m": Workload(
        title="gated DeltaNet, 10 x 768, language",
        source="as many parameters as that Mamba, with the same batch",
        spec=PILE,
        layer="gated_delta_net",
        rows=256,
        fields=dict(heads=6),
        settings={**LANGUAGE, "model.depth": 10},
    ),
    "conv_s5_moving_mnist": _moving_mnist(600, 8, {}),
    # One sequence over 8 devices, at two lengths.
    "s5_64k": _bytes("s5", "S5", 2**16),
    "s5_1m": _bytes("s5", "S5", 2**20),
    "mamba_64k": _bytes("mamba", "Mamba", 2**16, "bfloat16"),
    "mamba_1m": _bytes("mamba", "Mamba", 2**20, "bfloat16"),
    "gated_delta_net_64k": _bytes(
        "gated_delta_net", "gated DeltaNet", 2**16, "bfloat16", heads=4
    ),
    "gated_delta_net_1m": _bytes(
        "gated_delta_net", "gated DeltaNet", 2**20, "bfloat16", heads=4
    ),
    "s4d_64k": _bytes("s4d", "S4D", 2**16),
    "s4d_1m": _bytes("s4d", "S4D", 2**20),
    # The last frame is predicted and not read.
    "conv_s5_600": _moving_mnist(601, 1, {"mesh.sequence": 8}, OVER_TIME),
    "conv_s5_4800": _moving_mnist(4_801, 1, {"mesh.sequence": 8}, OVER_TIME),
}


def get(name: str) -> Workload:
    """The workload of this name; `ValueError` lists the names."""
    if name not in WORKLOADS:
        raise ValueError(
            f"--workload must be one of {', '.join(WORKLOADS)}, got {name!r}"
        )
    return WORKLOADS[name]
