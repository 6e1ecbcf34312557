"""What a reader sees of a colour: contrast by WCAG 2, distance in OKLab, and how dichromats see it."""

from __future__ import annotations

import math

Triple = tuple[float, float, float]

# Of linear RGB; Machado, Oliveira and Fernandes (2009), severity 1.
_VISIONS: dict[str, tuple[Triple, Triple, Triple]] = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# Ottosson (2020).
_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _times(matrix: tuple[Triple, Triple, Triple], vector: Triple) -> Triple:
    a, b, c = (sum(m * v for m, v in zip(row, vector)) for row in matrix)
    return a, b, c


def _linear(code: str) -> Triple:
    """``#rrggbb`` as linear RGB."""
    r, g, b = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    a, c, d = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (r, g, b))
    return a, c, d


def contrast(one: str, other: str) -> float:
    """From 1, the same, to 21, black and white."""
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 for r, g, b in map(_linear, (one, other)))
    return high / low


def least_distance(one: str, other: str) -> float:
    """Of two colours in OKLab, over all kinds of vision; 1 is from black to white."""
    return min(math.dist(_lab(one, kind), _lab(other, kind)) for kind in _VISIONS)


def _lab(code: str, vision: str) -> Triple:
    seen = _times(_VISIONS[vision], _linear(code))
    long, medium, short = (max(0.0, min(1.0, v)) for v in seen)
    a, b, c = (v ** (1 / 3) for v in _times(_LMS, (long, medium, short)))
    return _times(_LAB, (a, b, c))
