"""Every layer at a small size, for what examines them all: laws, rounding, tests."""

from layers.models.build import FRAME_LAYERS, LAYERS

L = 15  # the length they are examined at: odd, thirds are too, no power of two
FEATURES = 6
SIZE = (2, 3)  # of the frames of a layer over images

# Every layer of LAYERS and FRAME_LAYERS, and the variants whose code path differs.
CASES = {
    "s4": lambda: LAYERS["s4"](FEATURES, L, 8),
    "s4 legt": lambda: LAYERS["s4"](FEATURES, L - 4, 8, measure="legt", rank=2),
    "s4 tied": lambda: LAYERS["s4"](FEATURES, 2 * L, 8, copies=2, step_scale=2.0),
    "s4 bidirectional": lambda: LAYERS["s4"](FEATURES, 2 * L, 8, bidirectional=True),
    "dss": lambda: LAYERS["dss"](FEATURES, L, 8),
    "dss exp": lambda: LAYERS["dss"](FEATURES, L, 8, variant="exp"),
    "dss bidirectional": lambda: LAYERS["dss"](FEATURES, L, 8, bidirectional=True),
    "s4d": lambda: LAYERS["s4d"](FEATURES, 8),
    "s4d bilinear": lambda: LAYERS["s4d"](FEATURES, 8, discretization="bilinear"),
    "s4d tied": lambda: LAYERS["s4d"](FEATURES, 8, spectrum="legs", copies=2),
    "s4d bidirectional": lambda: LAYERS["s4d"](FEATURES, 8, bidirectional=True),
    "s5": lambda: LAYERS["s5"](FEATURES, 8, 2),
    "s5 dirac": lambda: LAYERS["s5"](FEATURES, 8, discretization="dirac"),
    "s5 without conj_sym": lambda: LAYERS["s5"](FEATURES, 8, conj_sym=False),
    "s5 bidirectional": lambda: LAYERS["s5"](FEATURES, 8, bidirectional=True),
    "lru": lambda: LAYERS["lru"](FEATURES, 8),
    "mamba": lambda: LAYERS["mamba"](FEATURES, 4),
    "mamba2": lambda: LAYERS["mamba2"](FEATURES, 4, 3, 2),
    "rg_lru": lambda: LAYERS["rg_lru"](FEATURES, 8, 2),
    "retention": lambda: LAYERS["retention"](FEATURES, 3),
    "lightning": lambda: LAYERS["lightning"](FEATURES, 3),
    "gla": lambda: LAYERS["gla"](FEATURES, 3, rank=2),
    "delta_net": lambda: LAYERS["delta_net"](FEATURES, 2),
    "gated_delta_net": lambda: LAYERS["gated_delta_net"](FEATURES, 2),
    "h3": lambda: LAYERS["h3"](FEATURES, 4, 5),
    "h3 heads": lambda: LAYERS["h3"](FEATURES, 4, 5, 2),
    "hyena": lambda: LAYERS["hyena"](FEATURES, 2 * L, 3, hidden=8),
    "long_conv": lambda: LAYERS["long_conv"](FEATURES, 2 * L),
    "long_conv smooth": lambda: LAYERS["long_conv"](
        FEATURES, L + 4, "double_exp", 0.01, 3, "frequency"
    ),
    "long_conv bidirectional": lambda: LAYERS["long_conv"](
        FEATURES, 2 * L, bidirectional=True
    ),
    "flash_butterfly": lambda: LAYERS["flash_butterfly"](FEATURES, 2 * L),
    "sg_conv": lambda: LAYERS["sg_conv"](FEATURES, 2 * L, 4),
    "sg_conv learned": lambda: LAYERS["sg_conv"](FEATURES, L + 4, 4, "sum", "learned"),
    "sg_conv bidirectional": lambda: LAYERS["sg_conv"](
        FEATURES, 2 * L, 4, bidirectional=True
    ),
    "attention": lambda: LAYERS["attention"](FEATURES, 3, context=2 * L),
    "attention window": lambda: LAYERS["attention"](FEATURES, 1, window=4),
    "attention bidirectional": lambda: LAYERS["attention"](
        FEATURES, 3, 1, context=2 * L, bidirectional=True
    ),
    "lstm": lambda: LAYERS["lstm"](FEATURES),
    "gru": lambda: LAYERS["gru"](FEATURES),
    "conv_s5": lambda: FRAME_LAYERS["conv_s5"](FEATURES, SIZE, 8, 2),
    "conv_s5 linear": lambda: FRAME_LAYERS["conv_s5"](
        FEATURES, SIZE, 8, output="linear", chunk=4
    ),
    "conv_s5 standard": lambda: FRAME_LAYERS["conv_s5"](
        FEATURES, SIZE, 8, output="standard"
    ),
    "conv_s5 diag_resnet": lambda: FRAME_LAYERS["conv_s5"](
        FEATURES, SIZE, 8, output="diag_resnet"
    ),
    "conv_s5 half_glu": lambda: FRAME_LAYERS["conv_s5"](
        FEATURES, SIZE, 8, output="half_glu"
    ),
    "conv_lstm": lambda: FRAME_LAYERS["conv_lstm"](FEATURES, SIZE),
    "frame_attention": lambda: FRAME_LAYERS["frame_attention"](
        FEATURES, SIZE, 3, context=2 * L
    ),
    "full_frame_attention": lambda: FRAME_LAYERS["full_frame_attention"](
        FEATURES, SIZE, 3, context=2 * L
    ),
}
