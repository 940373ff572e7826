"""Patients and their simulated futures as one page that needs no network: pictures, and the same as tables.

Everything is drawn here; without scripts all patients stand one below the other. The script of the page only shows one
at a time.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape

from federation import page
from server.curves import ticks
from server.lifelines import KINDS, Book, Future, Happening, Lifeline
from tokenizer import durable

_WIDTH, _LEFT, _RIGHT, _ROW = 720.0, 112.0, 14.0, 26.0
_MOST = 400
"""Events in the table of a history; older ones are in the picture only."""


def write_page(path: Path, books: Sequence[Book], title: str, *, made_up: bool) -> None:
    """Write the page; for nobody but its owner to read, unless the patients are made up.

    Args:
        path: of the page.
        books: what to show, by task.
        title: of the page.
        made_up: whether no patient is real.
    """
    with durable.file(path) as aside:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644 if made_up else 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(render(books, title, made_up=made_up).encode())


def render(books: Sequence[Book], title: str, *, made_up: bool) -> str:
    """Give the HTML page."""
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters.update(day=_day, value=_value)
    environment.globals.update(
        timeline=_timeline, lanes=_lanes, curve=_curve, days_of=_days_of, most=_MOST, kinds=KINDS
    )
    return environment.get_template("lifelines.html.j2").render(books=books, title=title, made_up=made_up)


def _day(day: float) -> str:
    """Write a day counted from the prediction: `3.2 days before`."""
    if abs(day) < 1 / 24:
        return "at the prediction" if day <= 0 else "within the hour"
    size = abs(day)
    text = f"{size / 365.25:.1f} years" if size >= 1000 else f"{size:.0f} days" if size >= 20 else f"{size:.1f} days"
    return f"{text} before" if day < 0 else f"day {day:.1f}"


def _value(event: Happening) -> str:
    return "" if event.value is None else f"{event.value:.4g} {event.unit}".strip()


def _days_of(events: Iterable[Happening]) -> list[tuple[str, list[Happening]]]:
    """Group events that are told the same day."""
    return [(day, list(group)) for day, group in groupby(events, key=lambda event: _day(event.day))]


def _said(event: Happening) -> str:
    return " ".join(filter(None, (f"{_day(event.day)}: {event.name}", _value(event))))


def _timeline(line: Lifeline) -> Markup:
    """The history as a row of marks for each kind of event, the prediction at the right end."""
    kinds = [kind for kind in KINDS if any(event.kind == kind for event in line.history)]
    if not kinds:
        return Markup("")
    first = min(*(event.day for event in line.history), -1.0)
    height = _ROW * len(kinds) + 34

    def x_at(day: float) -> float:
        return _LEFT + (min(day, 0.0) - first) / -first * (_WIDTH - _LEFT - _RIGHT)

    said = f"{len(line.history)} events over {-first:.0f} days before the prediction"
    parts = [_svg_head(height, said)]
    parts += _axis([day for day in ticks(first, 0, 6) if first <= day <= 0], x_at, height)
    for row, kind in enumerate(kinds):
        y = 14 + _ROW * row
        parts.append(f'<text class="tick left" x="{_LEFT - 10:g}" y="{y + 4:g}">{escape(kind)}</text>')
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:g}" y2="{y:g}"/>')
        parts += [_mark(x_at(event.day), y, event) for event in line.history if event.kind == kind]
    parts.append(f'<line class="now" x1="{x_at(0):.1f}" x2="{x_at(0):.1f}" y1="0" y2="{height - 30:g}"/>')
    return Markup("".join(parts) + "</svg>")


def _lanes(line: Lifeline, horizon: float | None) -> Markup:
    """The futures as lanes, one below the other, from the prediction to the horizon."""
    last = horizon or max([future.day for future in line.futures] + [1.0])
    height = _ROW * len(line.futures) + 34

    def x_at(day: float) -> float:
        return _LEFT + min(max(day, 0.0), last) / last * (_WIDTH - _LEFT - _RIGHT)

    came = sum(future.end == "outcome" for future in line.futures)
    parts = [_svg_head(height, f"{len(line.futures)} simulated futures; the outcome comes in {came} of them")]
    parts += _axis(ticks(0, last, 6), x_at, height, last)
    for row, future in enumerate(line.futures):
        y = 14 + _ROW * row
        end = x_at(future.day)
        parts.append(f'<text class="tick left" x="{_LEFT - 10:g}" y="{y + 4:g}">future {row + 1}</text>')
        parts.append(f'<line class="lane" x1="{_LEFT:g}" x2="{end:.1f}" y1="{y:g}" y2="{y:g}"/>')
        parts += [_mark(x_at(event.day), y, event) for event in future.events if event.day <= last]
        parts.append(_end(end, y, future))
    parts.append(f'<line class="now" x1="{_LEFT:g}" x2="{_LEFT:g}" y1="0" y2="{height - 30:g}"/>')
    return Markup("".join(parts) + "</svg>")


def _curve(line: Lifeline) -> Markup:
    """The risk by day, with a band of 1.96 standard errors over trajectories."""
    if not line.days:
        return Markup("")
    height, bottom, top = 210.0, 176.0, 10.0
    days, curve, errors = (0.0, *line.days), (0.0, *line.curve), (0.0, *line.curve_se)
    most = min(1.0, max(0.05, *(risk + 1.96 * se for risk, se in zip(curve, errors, strict=True))))
    levels = [level for level in ticks(0, most, 4) if level <= 1]
    most = max(most, levels[-1])

    def x_at(day: float) -> float:
        return _LEFT + day / days[-1] * (_WIDTH - _LEFT - _RIGHT)

    def y_at(risk: float) -> float:
        return bottom - min(max(risk, 0.0), most) / most * (bottom - top)

    said = f"risk rises to {100 * curve[-1]:.1f} % by day {days[-1]:g}, standard error {100 * errors[-1]:.1f} %"
    parts = [_svg_head(height, said), *_axis(ticks(0, days[-1], 6), x_at, height, days[-1])]
    for level in levels:
        y = y_at(level)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick left" x="{_LEFT - 10:g}" y="{y + 4:.1f}">{100 * level:g} %</text>')
    both = list(zip(days, curve, errors, strict=True))
    upper = [f"{x_at(day):.1f},{y_at(risk + 1.96 * se):.1f}" for day, risk, se in both]
    lower = [f"{x_at(day):.1f},{y_at(risk - 1.96 * se):.1f}" for day, risk, se in reversed(both)]
    parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    points = " ".join(f"{x_at(day):.1f},{y_at(risk):.1f}" for day, risk, _ in both)
    parts.append(f'<polyline class="risk" points="{points}"/>')
    return Markup("".join(parts) + "</svg>")


def _svg_head(height: float, said: str) -> str:
    return f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {_WIDTH:g} {height:g}">'


def _axis(days: Sequence[float], x_at: Callable[[float], float], height: float, last: float = 0.0) -> list[str]:
    kept = [day for day in days if day <= last]
    return [f'<text class="tick" x="{x_at(day):.1f}" y="{height - 8:g}">{day:g}</text>' for day in kept] + [
        f'<text class="tick left" x="{_LEFT - 10:g}" y="{height - 8:g}">day</text>'
    ]


def _mark(x: float, y: float, event: Happening) -> str:
    kind = f"mark {event.kind}{' answers' if event.answers else ''}"
    size = 6.5 if event.answers else 4.0
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:g}" r="{size:g}"><title>{escape(_said(event))}</title></circle>'


def _end(x: float, y: float, future: Future) -> str:
    told = f"<title>{escape(future.end)}, day {future.day:.1f}</title>"
    if future.end == "outcome":
        return f'<path class="outcome" d="M{x:.1f},{y - 9:g}l7,9l-7,9l-7,-9z">{told}</path>'
    if future.end == "competing":
        return f'<path class="competing" d="M{x - 6:.1f},{y - 6:g}l12,12m0,-12l-12,12">{told}</path>'
    return f'<line class="stop" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 7:g}" y2="{y + 7:g}">{told}</line>'
