"""Numbers as people read them: sensible digits, a dash for what is undefined."""

import math
from datetime import UTC, datetime
from typing import Any

from torchrec_em3.plan_report import format_bytes

__all__ = ["FILTERS", "count", "date", "decimals", "percent", "short_count", "signed", "size", "three_digits"]

NOTHING = "\N{EN DASH}"


def _number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def decimals(value: Any, digits: int = 4) -> str:
    """Return a number with a fixed number of decimals."""
    number = _number(value)
    return NOTHING if number is None else f"{number:.{digits}f}"


def signed(value: Any, digits: int = 4) -> str:
    """Return a difference with its sign, a true minus included."""
    number = _number(value)
    if number is None:
        return NOTHING
    text = f"{number:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    """Return a whole number with thousands separated."""
    number = _number(value)
    return NOTHING if number is None else f"{number:,.0f}"


def short_count(value: Any) -> str:
    """Return a count of parameters and the like as 1.23 M."""
    number = _number(value)
    if number is None:
        return NOTHING
    for unit, limit in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= 0.9995 * limit:
            return f"{_three(number / limit)}{unit}"
    return f"{number:.0f}"


def percent(value: Any) -> str:
    """Return a share as whole percent."""
    number = _number(value)
    return NOTHING if number is None else f"{100 * number:.0f}%".replace("-", "\N{MINUS SIGN}")


def size(value: Any) -> str:
    """Return a byte count with its unit."""
    number = _number(value)
    return NOTHING if number is None else format_bytes(number)


def three_digits(value: Any) -> str:
    """Return a measured quantity with three significant digits."""
    number = _number(value)
    return NOTHING if number is None else _three(number)


def date(value: Any) -> str:
    """Return seconds since 1970 as a time of day in UTC, or the number itself where that is not a date."""
    number = _number(value)
    if number is None:
        return NOTHING
    try:
        return f"{datetime.fromtimestamp(number, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return count(number)


def _three(number: float) -> str:
    if number == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(float(f"{number:.2e}"))))
    return f"{number:.{min(max(places, 0), 6)}f}"


FILTERS = {
    "count": count,
    "date": date,
    "decimals": decimals,
    "percent": percent,
    "short_count": short_count,
    "signed": signed,
    "size": size,
    "three_digits": three_digits,
}
"""The functions above by the name that the page's template calls them by."""
