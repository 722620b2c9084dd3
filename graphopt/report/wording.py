"""Put numbers and lists into words."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["amount", "bytes_of", "listing", "percent", "plural", "seconds"]

_SCALES = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


def amount(value: float) -> str:
    """Write a count with three digits and a decimal prefix: 25.6 M."""
    for scale, prefix in _SCALES:
        if value >= scale:
            digits = f"{value / scale:#.3g}" if value < 999.5 * scale else f"{value / scale:.0f}"
            return digits.rstrip(".") + prefix
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def bytes_of(value: float) -> str:
    """Write a number of bytes with a decimal prefix: 102 MB."""
    written = amount(value)
    return f"{written}B" if written[-1].isalpha() else f"{written} B"


def seconds(value: float) -> str:
    """Write a duration: 12 ms, 3.4 s, 2 min 5 s."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def percent(part: float, whole: float) -> str:
    """Write a share: 47.4 %."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Write a count with its noun: 1 group, 2 groups."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def listing(names: Sequence[str], most: int = 3) -> str:
    """Write the first few of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
