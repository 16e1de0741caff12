"""Which backend computes an operation.

A backend is a module with `unsupported(*arguments) -> str | None`: the reason why it
cannot take these arguments on this device, or None. Each operation has a table of them,
the most preferred first.
"""

import logging
from types import ModuleType

_log = logging.getLogger(__name__)
_excluded: dict[tuple[str, str], str] = {}
_chosen: dict[str, tuple[str, str]] = {}


def pick(
    op: str, backends: dict[str, ModuleType], backend: str | None, *arguments
) -> ModuleType:
    """The backend module that computes `op` for these arguments.

    Args:
        op: the operation's name, for messages and the report.
        backends: name -> module, by preference.
        backend: None takes the first that supports the arguments and is not excluded; a
            name takes exactly that one, even where it is excluded from the default.
        *arguments: what the operation was called with, for `unsupported`.

    Raises:
        ValueError: the name is unknown, or the backend cannot take the arguments; the
            message lists every backend with its reason.
    """
    reasons = {
        name: module.unsupported(*arguments) for name, module in backends.items()
    }
    if backend is not None:
        if backend not in backends:
            raise ValueError(f"{op}: unknown backend {backend!r}; {_listing(reasons)}")
        if reasons[backend] is not None:
            raise ValueError(
                f"{op}: backend {backend!r} cannot run; {_listing(reasons)}"
            )
        _note(op, backend, "named by the caller")
        return backends[backend]
    passed = []
    for name, module in backends.items():
        reason = reasons[name] or _excluded.get((op, name))
        if reason is None:
            _note(op, name, "; ".join([*passed, f"{name}: first that can run"]))
            return module
        passed.append(f"{name}: {reason}")
        reasons[name] = reason
    raise ValueError(f"{op}: no backend can run; {_listing(reasons)}")


def exclude(op: str, backend: str, reason: str) -> None:
    """Takes `backend` out of the default choice for `op`; naming it still works."""
    _excluded[op, backend] = reason


def backend_report() -> dict[str, tuple[str, str]]:
    """Operation -> (backend of its latest call, why), for all called so far."""
    return dict(_chosen)


def _listing(reasons: dict[str, str | None]) -> str:
    return "backends are " + "; ".join(
        f"{name!r}: {reason or 'can run'}" for name, reason in reasons.items()
    )


def _note(op: str, backend: str, why: str) -> None:
    if op not in _chosen:
        _log.info("%s: backend %s (%s)", op, backend, why)
    _chosen[op] = (backend, why)
