"""Flax layers: one paper, one file, one contract.

    y, state = mixer.apply(variables, x, state=None, sequence=None, train=False)
    state    = mixer.init_state(batch_size)

x and y are [B, L, H], or frames [B, L, h, w, H]; the state goes in and comes out, so
L = 1 is decoding and a long call is a prefill. `sequence` is a `ssm.Sequence` with
mask, reset and dt.
"""

from layers.attention import Attention
from layers.cell import Cell
from layers.delta_net import DeltaNet
from layers.diagonal import prepare
from layers.dss import DSS
from layers.flash_butterfly import FlashButterfly
from layers.frames.conv_lstm import ConvLSTM
from layers.frames.conv_s5 import ConvS5
from layers.frames.frame_attention import FrameAttention, FullFrameAttention
from layers.gated_delta_net import GatedDeltaNet
from layers.gla import GLA
from layers.gru import GRU
from layers.h3 import H3
from layers.hyena import Hyena
from layers.laws.mixing import materialize
from layers.lightning import Lightning
from layers.long_conv import LongConv
from layers.lru import LRU
from layers.lstm import LSTM
from layers.mamba import Mamba
from layers.mamba2 import Mamba2
from layers.min_gru import MinGRU
from layers.models.build import FRAME_LAYERS, LAYERS, build, get
from layers.models.grid import Grid
from layers.models.model import Model
from layers.models.video import Video
from layers.models.vq import VQ
from layers.retention import Retention
from layers.rg_lru import RGLRU
from layers.s4 import S4
from layers.s4d import S4D
from layers.s5 import S5
from layers.sg_conv import SGConv
from ssm.sequence import Sequence

__all__ = [
    "DSS",
    "FRAME_LAYERS",
    "GLA",
    "GRU",
    "H3",
    "LAYERS",
    "LRU",
    "LSTM",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "VQ",
    "Attention",
    "Cell",
    "ConvLSTM",
    "ConvS5",
    "DeltaNet",
    "FlashButterfly",
    "FrameAttention",
    "FullFrameAttention",
    "GatedDeltaNet",
    "Grid",
    "Hyena",
    "Lightning",
    "LongConv",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "Model",
    "Retention",
    "SGConv",
    "Sequence",
    "Video",
    "build",
    "get",
    "materialize",
    "prepare",
]
