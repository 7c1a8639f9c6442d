"""The one palette of pages for people: colours by name, for light and for dark, as custom properties of a style sheet.

`apps/web/static/style.css` spells out the same values at its head; a test holds the two equal.
"""

from __future__ import annotations

from markupsafe import Markup

COLOURS = {
    "paper": ("#f6f4f0", "#101317"),
    "sheet": ("#fffefb", "#171b20"),
    "sunk": ("#efece6", "#1f242a"),
    "ink": ("#1f2228", "#e3e2de"),
    "quiet": ("#5c616b", "#a2a7af"),
    "faint": ("#8a8f98", "#7b818a"),
    "line": ("#e1dcd3", "#2a3037"),
    "line-strong": ("#c9c2b6", "#3f4750"),
    "accent": ("#54418f", "#b7a6ea"),
    "accent-ink": ("#ffffff", "#17131f"),
    "accent-wash": ("#ece7f6", "#292440"),
    "good": ("#1d6b45", "#86d0a5"),
    "good-wash": ("#e2f1e8", "#15301f"),
    "warn": ("#7a4f00", "#e6bd6d"),
    "warn-wash": ("#faefd4", "#332811"),
    "bad": ("#9b241c", "#f0a097"),
    "bad-wash": ("#fae5e2", "#3a1c19"),
    "stage": ("#e9e5dd", "#0a0c0f"),
    "benign": ("#2f8579", "#58b3a6"),
    "early": ("#b98a0f", "#dcb244"),
    "pre": ("#cf5f22", "#e98753"),
    "pro": ("#ab3366", "#dd6c9c"),
    "predicted": ("#3b78b5", "#6aa3db"),
    "abstained": ("#8a8d98", "#8e929d"),
    "rejected": ("#d09a2d", "#dba945"),
    "quarantined": ("#c0392b", "#e2675a"),
    "missing": ("#5b4a3a", "#b39a80"),
    "left": ("#d8d2c7", "#323941"),
}
"""Name of the custom property -> its colour on light and on dark pages. Classes and statuses have their own names."""

SERIES = {
    "series-1": ("#2f5fd0", "#7ea2ff"),
    "series-2": ("#c05621", "#f6ad6b"),
    "series-3": ("#2f855a", "#68d391"),
    "series-4": ("#805ad5", "#b794f4"),
    "series-5": ("#b7791f", "#ecc94b"),
}
"""Colours of lines and columns that are neither a class nor a status, in this order. Only reports need them."""

FOR, AGAINST = "#ffe11a", "#12c9ff"
"""Of an activation map; seen well on violet nuclei, and of no hue that outlines have."""

_ATTENTION = ((0x5C, 0x74, 0x96), (0xF0, 0xA2, 0x1E), (0xE0, 0x22, 0x35))


def colour_of(name: str) -> str:
    """Return the CSS colour of a class, a status or a name of the palette; quiet where the palette has no such name.

    >>> colour_of("Benign"), colour_of("rejected"), colour_of("another class")
    ('var(--benign)', 'var(--rejected)', 'var(--quiet)')
    """
    known = name.lower()
    return f"var(--{known})" if known in COLOURS else "var(--quiet)"


def series_colour(place: int) -> str:
    """Return the CSS colour of the series at a place, counted from 0; colours repeat after the last one."""
    return f"var(--series-{place % len(SERIES) + 1})"


def attention_colour(weight: float) -> str:
    """Return the colour (`#rrggbb`) of attention relative to the field's highest, 0 to 1: slate over amber to red."""
    position = min(max(weight, 0.0), 1.0) * 2
    place = min(1, int(position))
    pairs = zip(_ATTENTION[place], _ATTENTION[place + 1], strict=True)
    return "#" + "".join(f"{round(low + (high - low) * (position - place)):02x}" for low, high in pairs)


def properties() -> Markup:
    """Return the palette as CSS: custom properties, with the dark ones for dark screens; paper is always light."""
    light, dark = ("".join(f"--{name}:{pair[place]};" for name, pair in (COLOURS | SERIES).items()) for place in (0, 1))
    return Markup(
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}"
    )
