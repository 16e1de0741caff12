"""The constants of a program that JAX has lowered."""


def largest_constant(lowered) -> int:
    """About how many bytes the largest constant of a lowered program takes: its text
    has two digits a byte on one line, so lines without one count as up to 100 bytes."""
    return max(map(len, lowered.as_text().splitlines())) // 2
