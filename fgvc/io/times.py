"""Times in words, as exact as an estimate is."""

from __future__ import annotations


def about(seconds: float) -> str:
    """An estimated time with one or two digits: `about 40 s`, `about 4 min`, `about 2 h 10 min`, `about 3 days`."""
    if seconds < 55:
        return f"about {max(1, round(seconds) if seconds < 10 else 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {max(1, minutes if minutes < 20 else 5 * round(minutes / 5))} min".replace("60 min", "1 h")
    hours, rest = divmod(10 * round(minutes / 10), 60)
    if hours < 10:
        return f"about {hours} h" + f" {rest} min" * bool(rest)
    return f"about {round(minutes / 60)} h" if minutes < 48 * 60 else f"about {round(minutes / 1440)} days"
