"""What every line of a reproduction says of where it was run."""

import platform

import jax


def machine() -> str:
    """What the seconds of a table were measured on."""
    device = jax.devices()[0].device_kind
    where = f"{device} ({platform.machine()}, {len(jax.devices())} device)"
    return f"{where}, jax {jax.__version__}"
