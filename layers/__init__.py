"""Flax layers: one paper, one file, one contract.

    y, state = mixer.apply(variables, x, state=None, sequence=None, train=False)
    state    = mixer.init_state(batch_size)

x and y are [B, L, H]; the state goes in and comes out, so L = 1 is decoding and a long
call is a prefill. `sequence` is a `ssm.Sequence` with mask, reset and dt.
"""

from layers.build import LAYERS, build, get
from layers.common import prepare
from layers.dss import DSS
from layers.gru import GRU
from layers.lru import LRU
from layers.model import Model
from layers.s4 import S4
from layers.s4d import S4D
from layers.s5 import S5
from ssm.sequence import Sequence

__all__ = [
    "DSS",
    "GRU",
    "LAYERS",
    "LRU",
    "S4",
    "S4D",
    "S5",
    "Model",
    "Sequence",
    "build",
    "get",
    "prepare",
]
