"""What datasets check of their arguments, named as the keys of a config."""

from collections.abc import Sequence


def at_least(name: str, value: int, least: int, why: str = "") -> None:
    """Raises a `ValueError` that names `data.name` unless `value` is large enough."""
    if value < least:
        reason = f" ({why})" if why else ""
        raise ValueError(f"data.{name} must be {least} or more{reason}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a `ValueError` that names `data.name` unless `value` is a choice."""
    if value not in choices:
        raise ValueError(
            f"data.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
