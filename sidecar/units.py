"""Numbers as people read them. Pure."""

from __future__ import annotations

# What is not known.
NONE = "–"  # noqa: RUF001 - a dash


def size(size_bytes: float) -> str:
    """Return bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Return a time of two digits, about."""
    if seconds is None:
        return NONE
    if seconds < 1:
        return f"{_two(seconds * 1000)} ms"
    return f"{_two(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def rate(per_s: float | None) -> str:
    """Return how often a second."""
    return NONE if per_s is None else f"{_two(per_s)}/s"


def percent(part: float | None) -> str:
    """Return a part of one."""
    return NONE if part is None else f"{_two(100 * part)} %"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}" if value >= 0.095 else f"{value:.2f}"
