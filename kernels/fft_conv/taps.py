"""The check that the filters of the operations here share."""


def check(op, name, taps, channels):
    """A `ValueError` unless taps is None or [H, K >= 1]."""
    if taps is None or (taps.ndim == 2 and taps.shape[0] == channels and taps.size):
        return
    raise ValueError(
        f"{op}: {name} must be [H, K] with H = {channels}, K >= 1, got {taps.shape}"
    )
