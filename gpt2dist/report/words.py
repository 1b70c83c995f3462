"""Numbers in words: sizes, times, counts."""

from __future__ import annotations


def size(number: float) -> str:
    """Bytes in powers of ten: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """3.2 s, 4:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(noun: str, number: int) -> str:
    """1 worker, 2 workers."""
    return f"{number} {noun}" + ("s" if number != 1 else "")
