"""Curves for pages that allow no style but their own: small SVG elements whose colours are classes of the style sheet.

(`server.plots` draws for files that stand alone; matplotlib writes styles into every element, and takes longer.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 420.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 40.0
KINDS = 6
"""So many curves can be told apart; more are drawn as one crowd."""


@dataclass(frozen=True)
class Curve:
    """Values by round; `main` is drawn above the others and thicker."""

    name: str
    values: Mapping[int, float]
    main: bool = False


def draw(curves: Sequence[Curve], described: str, unit: str) -> Markup:
    """Draw curves over rounds.

    Args:
        curves: what isn't finite is left out.
        described: what the picture shows, for who can't see it; the values' ends are added.
        unit: of the values, for their axis.

    Returns:
        An `<svg>` element, or nothing if there is nothing to draw.
    """
    kept = [
        Curve(curve.name, {x: y for x, y in sorted(curve.values.items()) if math.isfinite(y)}, curve.main)
        for curve in curves
    ]
    kept = [curve for curve in kept if curve.values]
    if not kept:
        return Markup("")
    xs = [x for curve in kept for x in curve.values]
    ys = [y for curve in kept for y in curve.values.values()]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6, whole=True), ticks(min(ys), max(ys), 5)
    x_at = _scale(min(xs), max(xs), _LEFT + 6, _WIDTH - _RIGHT - 6)
    y_at = _scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), _HEIGHT - _BOTTOM, _TOP)
    ends = "; ".join(f"{curve.name}: {_number(list(curve.values.values())[-1])}" for curve in kept[: KINDS + 1])
    said = f"{described} Last values, {unit}: {ends}."
    parts = [f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" class="curves">']
    parts += [_row(y_at(y), _number(y)) for y in y_ticks]
    parts += [f'<text class="tick" x="{x_at(x):.1f}" y="{_HEIGHT - _BOTTOM + 18:g}">{x:g}</text>' for x in x_ticks]
    parts.append(f'<text class="axis" x="{(_LEFT + _WIDTH) / 2:g}" y="{_HEIGHT - 5:g}">round</text>')
    classes = kinds([curve.name for curve in curves if not curve.main])
    for curve in sorted(kept, key=lambda curve: curve.main):
        points = [f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in curve.values.items()]
        kind = "main" if curve.main else classes[curve.name]
        parts.append(f'<polyline class="curve {kind}" points="{" ".join(points)}"/>')
        x, y = list(curve.values.items())[-1]
        parts.append(
            f'<circle class="end {kind}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="{3.5 if curve.main else 2.5}"/>'
        )
    return Markup("".join(parts) + "</svg>")


def kinds(names: Sequence[str]) -> Mapping[str, str]:
    """Give the class of every curve that is not the main one; the same name has the same in all pictures of a page."""
    ordered = sorted(set(names))
    many = len(ordered) > KINDS
    return {name: "crowd" if many else f"kind-{place}" for place, name in enumerate(ordered, 1)}


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Give round numbers from the last one below `low` to the first one above `high`, at most `most` + 2 of them.

    With `whole`, only whole numbers, and only between the two.

    >>> ticks(2.13, 4.9, 5)
    [2.0, 3.0, 4.0, 5.0]
    >>> ticks(1, 9, 6, whole=True)
    [2.0, 4.0, 6.0, 8.0]
    """
    span = (high - low) or abs(high) * 0.1 or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / most))
    step = next(magnitude * nice for nice in (1, 2, 5, 10) if magnitude * nice * most >= span)
    if whole:
        step = max(1.0, step)
    first, last = (math.ceil(low / step), math.floor(high / step)) if whole else (
        math.floor(low / step), math.ceil(high / step))  # fmt: skip
    return [round(place * step, 12) for place in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> "_Scale":
    return _Scale(low, (high - low) or 1.0, start, end, high == low)


@dataclass(frozen=True)
class _Scale:
    low: float
    span: float
    start: float
    end: float
    single: bool

    def __call__(self, value: float) -> float:
        share = 0.5 if self.single else (value - self.low) / self.span
        return self.start + share * (self.end - self.start)


def _row(y: float, told: str) -> str:
    line = f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="tick left" x="{_LEFT - 7:g}" y="{y + 4.5:.1f}">{told}</text>'


def _number(value: float) -> str:
    return f"{value:.4g}"
