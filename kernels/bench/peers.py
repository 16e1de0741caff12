"""Public PyTorch kernels on the same work, where they are installed beside a GPU.

Each entry takes a case's arguments as torch tensors on the device and gives a function
of the tensors that are differentiated, in the layout the peer wants: laying them out is
not timed.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Peer:
    """A public PyTorch kernel that computes the same as a case."""

    op: str  # of the case, and its name
    case: str
    name: str  # in the tables
    package: str  # that must be importable
    prepare: Callable  # tensors -> (function, tensors in the peer's layout)


def _mamba(tensors):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, A, B, C = tensors
    u, dt, B, C = (x.transpose(1, 2).contiguous() for x in (u, dt, B, C))
    return selective_scan_fn, [u, dt, A, B, C]


def _accelerated_scan(tensors):
    from accelerated_scan.warp import scan

    return scan, [x.transpose(1, 2).contiguous() for x in tensors]


def _simple_gla(tensors):
    from fla.ops.simple_gla import chunk_simple_gla

    return _first(chunk_simple_gla, q=0, k=1, v=2, g=3), list(tensors)


def _gated_delta(tensors):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    order = dict(q=0, k=1, v=2, g=3, beta=4)
    return _first(chunk_gated_delta_rule, **order), list(tensors)


def _first(function, **order):
    """The first result of a function called by name, with scale 1."""

    def run(*tensors):
        keywords = {name: tensors[i] for name, i in order.items()}
        return function(**keywords, scale=1.0)[0]

    return run


def _causal_conv(tensors):
    from causal_conv1d import causal_conv1d_fn

    u, w = tensors  # theirs has the newest input's tap last
    return causal_conv1d_fn, [u.transpose(1, 2).contiguous(), w.flip(1).contiguous()]


def _flash_fft_conv(tensors):
    import torch
    from flashfftconv import FlashFFTConv

    u, k = tensors
    u = u.transpose(1, 2).contiguous()
    conv = FlashFFTConv(2 * u.shape[-1], dtype=torch.bfloat16).to(u.device)
    return conv, [u.bfloat16(), k.float()]


PEERS = [
    Peer("selective_scan", "Mamba", "mamba-ssm", "mamba_ssm", _mamba),
    Peer(
        "linear_scan",
        "time-varying, real",
        "accelerated-scan",
        "accelerated_scan",
        _accelerated_scan,
    ),
    Peer("chunked_scan", "scalar decay", "flash-linear-attention", "fla", _simple_gla),
    Peer(
        "chunked_scan",
        "gated delta rule",
        "flash-linear-attention",
        "fla",
        _gated_delta,
    ),
    Peer("short_conv", "width 4", "causal-conv1d", "causal_conv1d", _causal_conv),
    Peer("fft_conv", "causal", "flash-fft-conv", "flashfftconv", _flash_fft_conv),
]


def installed(op: str, case: str) -> list[Peer]:
    """The peers of a case that can be imported, where PyTorch has a GPU."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        peer
        for peer in PEERS
        if (peer.op, peer.case) == (op, case)
        and importlib.util.find_spec(peer.package) is not None
    ]


def measure(peer: Peer, arguments, repeats: int) -> dict[str, dict]:
    """ "forward" and "forward+backward" -> seconds and peak temporary bytes.

    A peer that cannot take the size or the dtype gives its message instead.
    """
    import torch

    tensors = [_tensor(x) for x in arguments]
    try:
        function, inputs = peer.prepare(tensors)
        inputs = [x.detach().requires_grad_() for x in inputs]
        cotangent = torch.ones_like(function(*inputs))
    except Exception as error:
        return {"": {"failed": f"{type(error).__name__}: {error}"}}

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        return torch.autograd.grad(function(*inputs), inputs, cotangent)

    return {
        kind: _measured(run, repeats)
        for kind, run in (("forward", forward), ("forward+backward", both))
    }


def _tensor(x):
    import torch

    x = np.asarray(x)
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.astype(np.float32)).bfloat16().cuda()
    return torch.from_numpy(x).cuda()


def _measured(run, repeats):
    import torch

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10)
    temporary = torch.cuda.max_memory_allocated() - before
    return {"times_s": times, "temporary_bytes": temporary}
