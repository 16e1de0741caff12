"""Which backend computes an operation.

A backend is a module with `unsupported(*arguments) -> str | None`: the reason why it
cannot take these arguments on this device, or None (said here for all of them). Each
operation has a table of backends, the most preferred first. One for a single platform
stands there as `OnPlatform`.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType

from kernels import compat

OPERATIONS = (
    "butterfly_conv",
    "cauchy",
    "chunked_scan",
    "contracted_scan",
    "fft_conv",
    "linear_scan",
    "selective_scan",
    "short_conv",
    "vandermonde",
    "vandermonde_transpose",
)

_log = logging.getLogger(__name__)
_excluded: dict[tuple[str, str], str] = {}
_chosen: dict[str, tuple[str, str]] = {}
_preferred: ContextVar[dict[str, str] | None] = ContextVar("preferred", default=None)


class OnPlatform:
    """A backend module that is imported when it is first needed, and is chosen by
    default only on its own platform: elsewhere it is interpreted, which is slow."""

    def __init__(
        self, module: str, platform: str, missing: Callable[[], str | None]
    ) -> None:
        self._module, self.platform, self._missing = module, platform, missing

    def unsupported(self, *arguments) -> str | None:
        missing = self._missing()
        return missing or self._loaded().unsupported(*arguments)

    def not_by_default(self) -> str | None:
        """Why this backend is not a default here; None if it is."""
        if elsewhere(self):
            return f"for {self.platform}, would be interpreted here"
        if compat.partitioned_by_xla():
            return (
                "several devices outside jax.shard_map and kernels.shards.over: XLA "
                "cannot split a kernel"
            )
        return None

    def _loaded(self) -> ModuleType:
        return importlib.import_module(self._module)

    def __getattr__(self, name):
        return getattr(self._loaded(), name)


def triton(module: str) -> OnPlatform:
    """A backend for NVIDIA GPUs: the module of this name."""
    return OnPlatform(module, "gpu", compat.triton_missing)


def pallas_tpu(module: str) -> OnPlatform:
    """A backend for TPUs: the module of this name."""
    return OnPlatform(module, "tpu", compat.pallas_tpu_missing)


def elsewhere(module: ModuleType | OnPlatform) -> bool:
    """Whether a backend is for another platform than this one."""
    return isinstance(module, OnPlatform) and compat.platform() != module.platform


def pick(
    op: str,
    backends: dict[str, ModuleType],
    backend: str | None,
    *arguments,
    advice: dict[str, tuple[bool, str]] | None = None,
) -> ModuleType:
    """The backend module that computes `op` for these arguments.

    Args:
        op: the operation's name, for messages and the report.
        backends: name -> module, by preference.
        backend: None takes the first that supports the arguments and is not excluded; a
            name takes exactly that one, even where it is excluded from the default.
        *arguments: what the operation was called with, for `unsupported`.
        advice: name -> whether to take it by default for these arguments and why (not),
            where which backend is fastest depends on them.

    Raises:
        ValueError: the name is unknown, or the backend cannot take the arguments; the
            message lists every backend with its reason.
    """

    def suits(name: str) -> tuple[bool, str]:
        return (advice or {}).get(name, (True, "first that can run"))

    def why_not(name: str) -> str | None:
        """Asks the cheap questions first: the last one may import Pallas or Triton."""
        module = backends[name]
        return (
            _excluded.get((op, name))
            or _not_by_default(module)
            or (None if suits(name)[0] else suits(name)[1])
            or module.unsupported(*arguments)
        )

    def listing() -> str:
        return "backends are " + "; ".join(
            f"{name!r}: {module.unsupported(*arguments) or why_not(name) or 'can run'}"
            for name, module in backends.items()
        )

    if backend is None:
        backend = (_preferred.get() or {}).get(op)
    if backend is not None:
        if backend not in backends:
            raise ValueError(
                f"{op}: backend must be one of {[*backends]}, got {backend!r}; "
                f"{listing()}"
            )
        if backends[backend].unsupported(*arguments) is not None:
            raise ValueError(f"{op}: backend {backend!r} cannot run; {listing()}")
        note(op, backend, "named by the caller")
        return backends[backend]
    skipped = []
    for name, module in backends.items():
        reason = why_not(name)
        if reason is None:
            note(op, name, "; ".join([*skipped, f"{name}: {suits(name)[1]}"]))
            return module
        skipped.append(f"{name}: {reason}")
    raise ValueError(f"{op}: no backend can run; {listing()}")


def exclude(op: str, backend: str, reason: str) -> None:
    """Takes `backend` out of the default choice for `op`; naming it still works.

    Raises:
        ValueError: there is no such operation, or it has no such backend.
    """
    _known("exclude", op, backend)
    _excluded[op, backend] = reason


@contextlib.contextmanager
def prefer(**backends: str) -> Iterator[None]:
    """Calls inside that name no backend take these: `prefer(linear_scan="xla")`.

    As with a named backend nothing else is taken where it cannot run. It acts when a
    call is traced: what `jax.jit` compiled before keeps its backend, and what it
    compiles inside keeps it afterwards.

    Raises:
        ValueError: there is no such operation, or it has no such backend.
    """
    for op, backend in backends.items():
        _known("prefer", op, backend)
    token = _preferred.set((_preferred.get() or {}) | backends)
    try:
        yield
    finally:
        _preferred.reset(token)


def backend_report() -> dict[str, tuple[str, str]]:
    """Operation -> (backend, why), as chosen when it was traced last; a call that is
    compiled already chooses nothing and is not in it."""
    return dict(_chosen)


def note(op: str, backend: str, reason: str) -> None:
    """Puts what was chosen, and why, into `backend_report`."""
    if op not in _chosen:
        _log.info("%s: backend %s (%s)", op, backend, reason)
    _chosen[op] = (backend, reason)


def _known(function: str, op: str, backend: str) -> None:
    if op not in OPERATIONS:
        raise ValueError(
            f"{function}: operation must be one of {', '.join(OPERATIONS)}, got {op!r}"
        )
    names = _table(op)
    if backend not in names:
        raise ValueError(
            f"{function}: backend of {op} must be one of {', '.join(names)}, got "
            f"{backend!r}"
        )


def _table(op: str) -> dict:
    # here, because the operations import this module; of `kernels`, also in a package
    kernels = importlib.import_module(__name__.rpartition(".")[0])
    function = getattr(kernels, op)
    return importlib.import_module(function.__module__).BACKENDS


def _not_by_default(module) -> str | None:
    return module.not_by_default() if isinstance(module, OnPlatform) else None
