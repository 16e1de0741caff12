"""How close predicted frames are to true ones, by horizon.

Frames are uint8, or floats in [0, 1], [B, T, h, w, C]: what comes after the context, so
that frame t has the horizon t + 1.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

# An exact frame has no PSNR, and one of them would make every mean infinite. Two
# different frames of 8 bits stay below this: one grey level in one of n values is
# 48.1 + 10 log10(n) dB, 84 for 64 x 64 and below 100 up to n = 150,000.
PSNR_CAP = 100.0
WINDOW = 11  # pixels of SSIM's Gaussian, as in the paper; fewer in a smaller frame
FRAMES = 64  # scored at once, which bounds the memory
PART = 16 * FRAMES  # on the device at once

FVD_FRAMES = 10  # fewer are nothing to I3D, which halves their number several times
SHOWN = 128  # frames that a network sees at once; I3D at least one clip
NETWORKS = {
    "FVD": "the I3D that is known as i3d_torchscript.pt (Kinetics-400; "
    "https://github.com/universome/stylegan-v says where to get it)",
    "LPIPS": "one that maps two batches of images, float [n, 3, h, w] in [-1, 1], to n "
    "distances, such as torch.jit.trace of lpips.LPIPS() "
    "(https://github.com/richzhang/PerceptualSimilarity)",
}


def frame_metrics(truth, prediction) -> dict[str, np.ndarray]:
    """Every frame's scores, float32 [B, T].

    "mse": mean squared error, 1 being the range of a pixel. "psnr": -10 log10 of it in
    dB, at most PSNR_CAP. "ssim": structural similarity
    (https://doi.org/10.1109/TIP.2003.819861), channel by channel.

    Raises:
        ValueError: shapes that differ or are not [B, T, h, w, C]; another dtype; floats
            outside of [0, 1].
    """
    _check_pair(truth, prediction)
    B, T = truth.shape[:2]
    flat = [np.asarray(x).reshape(B * T, *x.shape[2:]) for x in (truth, prediction)]
    parts = [
        jax.device_get(_scores(*(x[i : i + PART] for x in flat)))
        for i in range(0, B * T, PART)
    ]
    return {
        name: np.concatenate([part[name] for part in parts]).reshape(B, T)
        for name in parts[0]
    }


def copy_last(context, horizon: int) -> np.ndarray:
    """The baseline that nothing moves: the last frame of the context [B, T, ...] for
    `horizon` frames, [B, horizon, ...]."""
    context = np.asarray(context)
    if context.ndim < 2 or not context.shape[1]:
        raise ValueError(
            f"context must be [B, T, ...] with T >= 1, got {context.shape}"
        )
    if horizon < 1:
        raise ValueError(f"horizon must be 1 or more, got {horizon}")
    return np.repeat(context[:, -1:], horizon, axis=1)


@jax.jit
def _scores(truth, prediction):
    """Of frames [n, h, w, C]."""
    widest = min(truth.shape[1:3]) - 1 + min(truth.shape[1:3]) % 2

    def score(pair):
        a, b = (_unit(x) for x in pair)
        mse = dm_pix.mse(a, b)
        psnr = jnp.minimum(dm_pix.psnr(a, b), PSNR_CAP)
        ssim = dm_pix.ssim(a, b, filter_size=min(WINDOW, widest))
        return {"mse": mse, "psnr": psnr, "ssim": ssim}

    return jax.lax.map(score, (truth, prediction), batch_size=FRAMES)


def _unit(frames):
    """Frames as float32 in [0, 1]."""
    scale = 255 if frames.dtype == jnp.uint8 else 1
    return frames.astype(jnp.float32) / scale


def _check_pair(truth, prediction) -> None:
    if truth.shape != prediction.shape:
        raise ValueError(
            f"prediction must have the shape of truth, {truth.shape}, got "
            f"{prediction.shape}"
        )
    for name, frames in (("truth", truth), ("prediction", prediction)):
        check_frames(name, frames, 5, "[B, T, h, w, C]")


def check_frames(name: str, frames, rank: int, axes: str) -> None:
    """Raises a `ValueError` unless `frames` are uint8 or in [0, 1], of `rank` axes."""
    if frames.ndim != rank or 0 in frames.shape:
        raise ValueError(f"{name} must be {axes}, got shape {frames.shape}")
    if frames.dtype == np.uint8:
        return
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"{name} must be uint8 or floating, got {frames.dtype}")
    low, high = frames.min(), frames.max()
    if low < 0 or high > 1:  # not a number passes: a model that diverged is no mistake
        raise ValueError(
            f"{name} must be uint8 or lie in [0, 1], it lies in [{low:.3g}, {high:.3g}]"
        )


def unavailable(metric: str, network: str) -> str:
    """What `metric`, "FVD" or "LPIPS", lacks to be computed with the TorchScript file
    `network`; "" if nothing."""
    needs = []
    if not network or not Path(network).expanduser().is_file():
        problem = f"there is no file {network!r}" if network else "none is given"
        needs.append(
            f"the TorchScript file of a network ({problem}): {NETWORKS[metric]}"
        )
    if importlib.util.find_spec("torch") is None:
        needs.append("PyTorch, which `pip install torch` brings")
    return f"{metric} needs {'; and '.join(needs)}" if needs else ""


def fvd(truth, prediction, network: str | Callable) -> float:
    """Frechet distance between features of true and predicted clips
    (https://arxiv.org/abs/1812.01717).

    It depends on the number of clips and of frames: compare equal ones only. With fewer
    clips than a network has features (I3D: 400) it is biased upwards by much.

    Args:
        truth, prediction: frames [B, T, h, w, C], C being 1 or 3, with B >= 2.
        network: path of i3d_torchscript.pt, which wants 10 frames or more; or a
            function from float32 clips [n, T, h, w, 3] in [0, 1] to features [n, F].

    Raises:
        ValueError: frames of another form; a network that is not available.
    """
    _check_colours(truth, prediction)
    if len(truth) < 2:
        raise ValueError(f"truth: must be 2 clips or more for FVD, got {len(truth)}")
    if not callable(network):
        if truth.shape[1] < FVD_FRAMES:
            raise ValueError(
                f"truth: must be clips of {FVD_FRAMES} frames or more for I3D, got "
                f"{truth.shape[1]}"
            )
        network = functools.partial(_i3d, _torchscript("FVD", network))
    clips = max(1, SHOWN // truth.shape[1])
    return frechet(*(_in_parts(network, clips, x) for x in (truth, prediction)))


def lpips(truth, prediction, network: str | Callable) -> np.ndarray:
    """Perceptual distance of every frame, [B, T]
    (https://arxiv.org/abs/1801.03924).

    Args:
        truth, prediction: frames [B, T, h, w, C], C being 1 or 3.
        network: path of a TorchScript file, see NETWORKS; or a function of two batches
            of float32 images [n, h, w, 3] in [0, 1] to distances [n].

    Raises:
        ValueError: frames of another form; a network that is not available.
    """
    _check_colours(truth, prediction)
    if not callable(network):
        network = functools.partial(_distances, _torchscript("LPIPS", network))
    flat = (x.reshape(-1, *x.shape[2:]) for x in (truth, prediction))
    return _in_parts(network, SHOWN, *flat).reshape(truth.shape[:2])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Frechet distance
    of Gaussians with the means and covariances of the rows of a, b [n, F]."""
    means = [x.mean(axis=0) for x in (a, b)]
    roots = [_root(np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)]
    # C = R R': the eigenvalues of C_a C_b are the squares of the singular values of
    # R_a' R_b, which are exact also where there are fewer rows than features.
    cross = linalg.svdvals(roots[0].T @ roots[1]).sum()
    traces = sum(np.sum(root**2) for root in roots)
    return float(np.sum((means[0] - means[1]) ** 2) + traces - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def _check_colours(truth, prediction) -> None:
    _check_pair(truth, prediction)
    if truth.shape[-1] not in (1, 3):
        raise ValueError(f"frames must have 1 or 3 channels, got {truth.shape[-1]}")


def _in_parts(network: Callable, size: int, *videos) -> np.ndarray:
    """The network's rows, float64, of `size` clips or frames at a time."""
    rows = []
    for start in range(0, len(videos[0]), size):
        part = [np.asarray(_unit(v[start : start + size])) for v in videos]
        rows.append(network(*(np.repeat(x, 3 // x.shape[-1], -1) for x in part)))
    return np.concatenate(rows).astype(np.float64)


def _torchscript(metric: str, path: str):
    reason = unavailable(metric, path)
    if reason:
        raise ValueError(reason)
    import torch  # an option: only who has such a network has it

    try:
        network = torch.jit.load(str(Path(path).expanduser()), map_location="cpu")
    except Exception as error:  # RuntimeError, and what its ZIP reader raises
        raise ValueError(f"{path}: not a TorchScript file ({error})") from error
    return network.eval()


def _i3d(network, clips: np.ndarray) -> np.ndarray:
    """It scales 0 to 255 to its own range, and frames to 224 x 224, by itself."""
    import torch

    with torch.no_grad():
        inputs = torch.from_numpy(255 * clips.transpose(0, 4, 1, 2, 3))
        features = network(inputs, rescale=True, resize=True, return_features=True)
    return features.numpy()


def _distances(network, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    import torch

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(2 * x.transpose(0, 3, 1, 2) - 1))

    with torch.no_grad():
        distances = network(tensor(truth), tensor(prediction))
    return distances.numpy().reshape(len(truth))
