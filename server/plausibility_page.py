"""What `server.plausibility` found, as an HTML page, as JSON beside it, and as a table for the terminal."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich import box
from rich.markup import escape
from rich.table import Table

from federation import canonical, page
from server import plots
from server.plausibility import Plausibility
from tokenizer import durable

_SHOWN = 30
_MARKS = 6


def write_page(path: Path, found: Plausibility, title: str) -> None:
    """Write the page `path`, and the same as canonical JSON beside it (the page's name with `.json`)."""
    durable.write_bytes(path.with_suffix(".json"), canonical.encode(found))
    durable.write_bytes(path, render(found, title).encode())


def render(found: Plausibility, title: str) -> str:
    """Give the HTML page."""
    environment = page.environment(Path(__file__).parent / "templates")
    environment.filters["figure"] = _show
    template = environment.get_template("plausibility.html.j2")
    return template.render(found=found, title=title, pictures=_pictures(found), shown=_SHOWN)


def table(found: Plausibility) -> Table:
    """Give the figures as a table for a terminal."""
    told = Table(title=f"{found.trajectories} trajectories beside {found.spans} recorded spans", box=box.SIMPLE_HEAD)
    for heading in ("", "recorded", "generated", "unit"):
        told.add_column(heading, justify="right" if heading.endswith("ed") else "left")
    for each in found.findings:
        told.add_row(*map(escape, (each.name, _show(each.real), _show(each.generated), each.unit)))
    return told


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _pictures(found: Plausibility) -> list[tuple[str, str]]:
    """Pictures and what they show."""
    drawn = [_prevalence(found)] if found.prevalence else []
    for number, (name, (real, made)) in enumerate(found.quantiles.items()):

        def quantiles(axes: Axes, real: tuple[float, ...] = real, made: tuple[float, ...] = made) -> None:
            axes.plot(real, made, "o-", color=plots.INKS["second"], ms=4, lw=1)
            _square(axes, [*real, *made], _plain)

        picture = plots.picture(f"quantiles-{number}", f"Quantiles of {name}.", 4.1, 4.1, _labelled(quantiles))
        drawn.append((picture, f"{name[0].upper()}{name[1:]}: quantiles from 0 to 100 %, in steps of 5."))
    return drawn


def _prevalence(found: Plausibility) -> tuple[str, str]:
    least = min((share for _, *row in found.prevalence for share in map(float, row) if share > 0), default=1e-4)
    # Codes that one side doesn't have stand at the edge.
    real = [max(share, least / 2) for _, share, _ in found.prevalence]
    made = [max(share, least / 2) for _, _, share in found.prevalence]

    def prevalence(axes: Axes) -> None:
        axes.plot(real, made, "o", color=plots.INKS["first"], ms=4, alpha=0.7)
        _square(axes, [*real, *made], lambda share: f"{100 * share:g} %")

    picture = plots.picture(
        "prevalence", f"Prevalence of {len(found.prevalence)} codes.", 4.1, 4.1, _labelled(prevalence)
    )
    return picture, "Share of spans with a code; each dot is a code. What one side never has stands at its edge."


def _labelled(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
    def drawn(axes: Axes) -> None:
        draw(axes)
        axes.set_xlabel("recorded")
        axes.set_ylabel("generated")

    return drawn


def _square(axes: Axes, values: Sequence[float], told: Callable[[float], str]) -> None:
    """Draw the line of equal values below, and give both axes the same logarithmic scale (with room for 0)."""
    low, high = min(values), max(values)
    ends = (low / 1.3, high * 1.3) if low > 0 else (0.0, max(high, 1.0) * 1.3)
    axes.plot(ends, ends, color=plots.INKS["line"], lw=1, zorder=0)
    marks = _marks(*ends)
    for scale, limits, axis in (
        (axes.set_xscale, axes.set_xlim, axes.xaxis),
        (axes.set_yscale, axes.set_ylim, axes.yaxis),
    ):
        if low > 0:
            scale("log")
        else:
            scale("symlog", linthresh=1.0)
        limits(*ends)
        axis.set_major_locator(FixedLocator(marks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda mark, _: told(mark)))


def _marks(low: float, high: float) -> list[float]:
    """Six round numbers at most, by 1, 2 and 5, from which a logarithmic axis can be read."""
    least = low or 1.0
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(max(high, least))) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [step * 10.0**decade for decade in decades for step in steps if least <= step * 10.0**decade <= high]
        if len(marks) <= _MARKS:
            break
    return [*([] if low else [0.0]), *marks[:: math.ceil(len(marks) / _MARKS) or 1]]


def _plain(value: float) -> str:
    return f"{value:,.10g}"
