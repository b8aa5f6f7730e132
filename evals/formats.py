"""Numbers as people read them, the same way on the screen and in a report."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(\w://)[^/@\s\"']+@")
_SIGNATURE = re.compile(
    r"(?i)([?&][^=&\s\"']*(?:token|secret|key|signature|credential|password|sig)[^=&\s\"']*=)[^&\s\"']+"
)

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def figure(value: float | None, digits: int = 4) -> str:
    """A measured number with so many decimals, or as a power of ten where those would show nothing."""
    if value is None:
        return "-"
    if value and abs(value) < 10**-digits:
        return f"{value:.2e}"
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def short(value: float) -> str:
    """For the ticks of an axis: 12000 is 12k."""
    for unit, letter in UNITS:
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def size(number_of_bytes: float | None) -> str:
    if number_of_bytes is None:
        return "-"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number_of_bytes >= unit:
            return f"{number_of_bytes / unit:.1f} {name}"
    return f"{number_of_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """Two units at most: `3 h 12 min`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(0.0, seconds):.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def one_line(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def redact(text: str) -> str:
    """Without passwords and signatures that an address may carry: a configuration has no other place for secrets."""
    return _SIGNATURE.sub(r"\1***", _LOGIN.sub(r"\1***@", text))
